"""Deployments of a tiny random model in a Ray cluster of the test's own."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import Deployment, deployment
from benchmarks.drain import status
from benchmarks.launch_ray import actor_of
from benchmarks.processes import wait_gone
from benchmarks.ray_head import RayHead
from cluster.launch.control_messages import WorkerStatus
from tests.unit.model_factory import SIZES, random_model, save_safetensors, tiny_tokenizer

GONE_S = 30.0  # after a launcher was killed; actors that Ray does not end do so themselves, later
RUN_S = 120.0
ENGINE = ("num_threads=1", "block_size=16", "max_batched_tokens=64", "kv_cache_bytes=4MiB")

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def tiny_model(directory: Path) -> Path:
    save_safetensors(random_model("llama", max_position_embeddings=1024), directory)
    tiny_tokenizer(SIZES["vocab_size"]).save(str(directory / "tokenizer.json"))
    return directory


def ray_settings(head: RayHead, *settings: str) -> list[str]:
    engines = [f"{pool}.engine.{setting}" for pool in ("prefill", "decode") for setting in ENGINE]
    return [*engines, "launch.backend=ray", f"launch.ray.address={head.address}", *settings]


@contextmanager
def on_ray(head: RayHead, model: Path, *settings: str) -> Iterator[Deployment]:
    with deployment(str(model), ray_settings(head, *settings), environment=head.environment) as running:
        yield running


def failed_launch(head: RayHead, model: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """A launch that is expected to end by itself."""
    flags = [flag for setting in ray_settings(head, *settings) for flag in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "-m", "cluster", "launch", str(model), "--port", "0", *flags],
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )


def answering_workers(running: Deployment) -> tuple[WorkerStatus, ...]:
    """All, once every one has answered: one that was too slow to be asked has no engine id."""
    deadline = time.monotonic() + RUN_S
    while True:
        workers = asyncio.run(status(running)).workers
        if all(worker.engine_id for worker in workers):
            return workers
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)


def processes_of(workers: Sequence[WorkerStatus]) -> list[int]:
    """The workers' processes and their actors."""
    return [pid for worker in workers for pid in (worker.pid, actor_of(worker))]


def assert_gone(pids: Sequence[int]) -> None:
    wait_gone(pids, GONE_S)


def answer_of(url: str) -> object:
    body = {
        "model": "tiny",
        "prompt": "One, two,",
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]
