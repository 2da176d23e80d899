"""`cluster bench` against a running router with fake workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.bench.result_file import read_result
from cluster.errors import Overloaded
from cluster.types import Role
from tests.fakes import FakeWorker
from tests.integration.router_harness import RunningRouter, running_router
from tests.waiting import until

WAIT_S = 120.0
STEP_S = 0.005
SHORT = ("--prompt-tokens", "uniform:20:40", "--output-tokens", "6")


@asynccontextmanager
async def server(decode: FakeWorker) -> AsyncIterator[RunningRouter]:
    async with running_router([decode], [FakeWorker(Role.PREFILL, "p0")]) as router:
        yield router


async def start_bench(url: str, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", "bench", url, *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "120"},
    )


async def bench(url: str, *flags: str) -> tuple[int, str]:
    process = await start_bench(url, *flags)
    async with asyncio.timeout(WAIT_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    "load",
    [("--concurrency", "4", "--requests", "24", "--warmup", "3"), ("--rate", "100", "--requests", "24")],
    ids=["closed", "open"],
)
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_every_request_is_measured(load: tuple[str, ...], endpoint: str, tmp_path: Path) -> None:
    decode = FakeWorker(Role.DECODE, "d0", step_s=STEP_S)
    output, html = tmp_path / "a.jsonl", tmp_path / "a.html"
    files = ("--output", str(output), "--html", str(html), "--slo", "ttft=30s")
    async with server(decode) as router:
        code, text = await bench(router.url, *load, *SHORT, "--endpoint", endpoint, *files)
    assert code == 0, text
    summary = read_result(output)[1].summary
    assert (summary.num_requests, summary.num_failed, summary.mean_output_tokens) == (24, 0, 6.0)
    assert summary.ttft is not None
    assert summary.itl is not None
    assert summary.e2e is not None
    assert (summary.ttft.count, summary.itl.count) == (24, 24 * 5)
    assert summary.itl.mean * 5 == pytest.approx(summary.e2e.mean - summary.ttft.mean)
    assert summary.good_share == 1.0
    requests = [json.loads(line)["request"] for line in output.read_text().splitlines()[1:-1]]
    assert sorted(request["index"] for request in requests) == list(range(24))
    assert min(request["e2e_s"] for request in requests) >= 5 * STEP_S  # chunks that are read together have no gap
    assert html.read_text().count("<svg") == 5
    assert "time to first token" in text


async def test_failed_requests_are_counted_by_kind_and_exit_with_1() -> None:
    decode = FakeWorker(Role.DECODE, "d0")
    decode.error = Overloaded("no blocks")
    async with server(decode) as router:
        code, text = await bench(router.url, "--concurrency", "2", "--requests", "6", *SHORT)
    assert code == 1
    assert "6 failed" in " ".join(text.split())
    assert "failed: error_event" in text or "failed: http_503" in text


async def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    decode = FakeWorker(Role.DECODE, "d0", step_s=STEP_S)
    output = tmp_path / "a.jsonl"
    async with server(decode) as router:
        flags = ("--rate", "50", "--duration", "60", "--output", str(output), *SHORT)
        process = await start_bench(router.url, *flags)
        await until(lambda: len(decode.requests) - len(decode.running) >= 20, WAIT_S)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT_S):
            text, _ = await process.communicate()
    assert process.returncode == 130
    assert b"interrupted" in text
    _, line = read_result(output)
    assert not line.is_complete
    assert line.summary.num_requests > 0
    assert line.summary.num_failed == 0, "what was in flight is not an error"


async def test_two_results_are_compared(tmp_path: Path) -> None:
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    async with server(FakeWorker(Role.DECODE, "d0")) as router:
        for count, name in zip(("4", "8"), names, strict=True):
            assert (await bench(router.url, "--concurrency", "2", "--requests", count, "--output", str(name), *SHORT))[
                0
            ] == 0
    code, text = await bench("compare", *map(str, names))
    assert code == 0
    assert "differ in: num_requests" in text
    assert "time to first token, p50" in text


async def test_no_server_is_told_at_once() -> None:
    code, text = await bench("http://127.0.0.1:9", "--rate", "1", "--requests", "1")
    assert code == 2
    assert "cannot connect to 127.0.0.1:9" in " ".join(text.split())
