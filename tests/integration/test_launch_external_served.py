"""A tiny model served by the ranks of real torchrun and real mpirun, and used inside an SPMD job of torchrun."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.outer_launchers import Job, is_available, running_job
from cluster import LLM, Completion, EngineConfig, SamplingParams
from cluster.launch.ports import choose_free_port
from tests.unit.model_factory import save_servable

START_S, END_S = 150.0, 60.0
PROMPT = "one two three four five six seven eight nine ten"
SETTINGS = ("block_size=16", "num_threads=1", "max_batched_tokens=64", "kv_cache_bytes=8MiB")
ENGINE = EngineConfig(block_size=16, num_threads=1, max_batched_tokens=64, kv_cache_bytes=8 << 20)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model: Path) -> Completion:
    with LLM(str(model), engine=ENGINE) as llm:
        sampling = SamplingParams(max_tokens=24, seed=11, temperature=0.9, logprobs=2, ignore_eos=True)
        [completion] = llm.generate([PROMPT], sampling)
    return completion


def request(**changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 11, "temperature": 0.9, "logprobs": 2}
    return {**body, "ignore_eos": True, "return_token_ids": True, **changes}


def assert_served(url: str, expected: Completion) -> None:
    for _ in range(3):  # on either prefill worker, with a cold and a warm cache
        answer = httpx.post(f"{url}/v1/completions", json=request(), timeout=60.0)
        assert answer.status_code == 200, answer.text
        [choice] = answer.json()["choices"]
        assert tuple(choice["token_ids"]) == expected.token_ids
        assert choice["logprobs"]["token_logprobs"] == [entry.logprob for entry in expected.logprobs]


def ready_workers(directory: Path) -> list[dict[str, Any]]:
    """As `cluster status` shows them once all are ready: one that is slow to answer is shown as silent."""
    deadline = time.monotonic() + START_S
    while True:
        shown = subprocess.run(
            [sys.executable, "-m", "cluster", "status", "--json"],
            env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
            capture_output=True,
            timeout=60,
            check=True,
        )
        workers: list[dict[str, Any]] = json.loads(shown.stdout)["workers"]
        if all(worker["state"] == "ready" for worker in workers):
            return workers
        assert time.monotonic() < deadline, workers


async def stream_through_a_drain(url: str, job: Job) -> list[str]:
    """Rank 0 is told to stop once the first token is there; the finish reasons of the stream."""
    reasons: list[str] = []
    is_told = False
    body = request(max_tokens=180, stream=True)
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60.0) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if not is_told:
                    is_told = True
                    os.kill(job.rank_pids()[0], signal.SIGTERM)
                reasons += [choice["finish_reason"] for choice in json.loads(line[6:])["choices"]]
    return [reason for reason in reasons if reason]


@pytest.mark.parametrize(
    "launcher",
    ["torchrun", pytest.param("mpirun", marks=pytest.mark.skipif(not is_available("mpirun"), reason="no mpirun"))],
)
def test_router_two_prefill_one_decode(launcher: str, model: Path, expected: Completion, tmp_path: Path) -> None:
    port = choose_free_port("127.0.0.1")
    arguments = ["launch", str(model), "--prefill", "2", "--decode", "1", "--port", str(port), "--name", "tiny"]
    for setting in SETTINGS:
        for role in ("prefill", "decode"):
            arguments += ["--set", f"{role}.engine.{setting}"]
    url = f"http://127.0.0.1:{port}"
    with running_job(launcher, 4, arguments, tmp_path) as job:
        job.wait_for("Serving tiny at", START_S)
        assert_served(url, expected)
        workers = ready_workers(tmp_path)
        assert [worker["name"] for worker in workers] == ["prefill-0", "prefill-1", "decode-0"]
        assert all(worker["num_free_blocks"] > 0 for worker in workers)
        assert asyncio.run(stream_through_a_drain(url, job)) == ["length"]
        assert job.wait(END_S) == [0], job.log_tail()


def test_the_engine_inside_an_spmd_job(model: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.integration.spmd_job", str(model)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    report = json.loads(line.removeprefix("REPORT "))
    assert report["num_values"] == 3 * 16 * (1 + 1 + 3)
    assert report["ranks"] == [0, 1]
    assert report["equal_over_time"]
    assert report["equal_over_ranks"]
    assert report["sum_between"] == [1.0], "the process group did not work between two generations"
    assert report["sum_after"] == 3.0, "the process group did not work after the engine was closed"
    assert report["threads"] == [2, 2], "the trainer's torch has another number of threads than before"
