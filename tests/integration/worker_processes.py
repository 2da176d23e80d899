"""Prefill and decode workers as real processes with a tiny random model, for the hand-over tests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cluster.process_events import Failed, ProcessEvent, Ready, parse
from cluster.rpc import admin
from cluster.rpc.client import Connection, connect
from cluster.types import PrefillResult, Request, Role, SamplingParams, TokenChunk, TokenLogprob
from tests.waiting import until

START_TIMEOUT_S = 150.0  # kernels may have to be built and admitted first
BLOCK_SIZE = 16
NUM_BLOCKS = 64
TOKEN_BYTES = 2 * 2 * 3 * 16 * 2  # of KV: layers, K and V, heads, their size, bf16


@dataclass
class WorkerProcess:
    """One `python -m prefill` or `python -m decode`."""

    role: Role
    process: asyncio.subprocess.Process
    events: list[ProcessEvent] = field(default_factory=list)
    strangers: list[bytes] = field(default_factory=list)  # lines of stdout that are no events

    @property
    def address(self) -> str:
        [ready] = [event for event in self.events if isinstance(event, Ready)]
        return ready.address

    @property
    def failure(self) -> Failed:
        [failed] = [event for event in self.events if isinstance(event, Failed)]
        return failed

    async def read_events(self) -> None:
        """Until the process is ready or has ended."""
        assert self.process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := await self.process.stdout.readline():
                event = parse(line)
                if event is None:
                    self.strangers.append(line)
                    continue
                self.events.append(event)
                if isinstance(event, Ready):
                    return

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(60):
            return await self.process.wait()


async def start(role: Role, model: Path, key_file: Path, **config: Any) -> WorkerProcess:
    """A worker that is ready, or has failed (see `failure`)."""
    engine = {
        "block_size": BLOCK_SIZE,
        "num_threads": 1,
        "max_batched_tokens": 64,
        "kv_cache_bytes": NUM_BLOCKS * BLOCK_SIZE * TOKEN_BYTES,
        **config.pop("engine", {}),
    }
    settings = {"model": str(model), "cluster_key_file": str(key_file), "engine": engine, **config}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", role.value, "--config", json.dumps(settings)),
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    worker = WorkerProcess(role, process)
    try:
        await worker.read_events()
    except BaseException:
        process.kill()
        raise
    return worker


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str = ""

    def add(self, chunk: TokenChunk) -> None:
        assert chunk.error is not None or chunk.index == len(self.tokens)
        self.tokens += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.error is not None:
            self.error = f"{chunk.error.code}: {chunk.error.message}"


async def prefill(connection: Connection, request: Request) -> PrefillResult:
    async with aclosing(connection.prefill(request)) as events:
        async for event in events:
            if isinstance(event, PrefillResult):
                return event
    raise AssertionError("no result")


async def decode(connection: Connection, request: Request, kv: bytes | None, answer: Answer) -> None:
    chunks: AsyncGenerator[TokenChunk, None] = connection.decode(request, kv)
    async with aclosing(chunks):
        async for chunk in chunks:
            answer.add(chunk)


async def split(prefill_worker: Connection, decode_worker: Connection, request: Request) -> Answer:
    answer = Answer()
    result = await prefill(prefill_worker, request)
    answer.add(result.first)
    if result.kv is not None:
        await decode(decode_worker, continued(request, result), result.kv, answer)
    return answer


async def alone(decode_worker: Connection, request: Request) -> Answer:
    answer = Answer()
    await decode(decode_worker, request, None, answer)
    return answer


def continued(request: Request, result: PrefillResult) -> Request:
    return msgspec.structs.replace(
        request, token_ids=request.token_ids + result.first.token_ids, num_prompt_tokens=len(request.token_ids)
    )


def make_request(request_id: str, length: int, *, salt: bytes = b"", **sampling: Any) -> Request:
    token_ids = tuple((at * 31 + length * 7 + at * at) % 300 + 3 for at in range(length))
    settings = {"max_tokens": 12, "seed": length, "temperature": 0.0, "ignore_eos": True, "logprobs": 2, **sampling}
    return Request(request_id=request_id, token_ids=token_ids, cache_salt=salt, sampling=SamplingParams(**settings))


async def connected(worker: WorkerProcess) -> Connection:
    connection = connect(worker.address, worker.role)
    await until(lambda: connection.is_ready)
    return connection


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # the state of another process is awaited
            await asyncio.sleep(0.02)


async def is_idle(worker: WorkerProcess) -> bool:
    """Every block is free and the books are in order."""
    inspection = await admin.inspect(worker.address)
    assert inspection.integrity_error == ""
    held = (inspection.num_owned, inspection.num_leased, inspection.num_draining)
    return held == (0, 0, 0) and inspection.num_free == inspection.num_blocks and not inspection.num_leases
