"""How a router with its engine in the same process ends when that engine does: a real router, and a host that hangs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cluster.control.process import HUNG_S
from cluster.errors import StartupError
from cluster.launch import monolithic
from cluster.router.config import RouterConfig
from cluster.router.server import bind, url_of
from cluster.types import Request, TokenChunk, WorkerInfo, WorkerLoad
from tests.fakes import ByteCodec
from tests.worker_info import IDLE, worker_info


class Host:
    """Answers each request with one token, then never again. `hangs`: it is noticed once the client has that token."""

    is_draining = False

    def __init__(self, *, hangs: bool) -> None:
        self.broken = asyncio.Event()
        self.hangs = hangs
        self.is_read = asyncio.Event()

    def info(self) -> WorkerInfo:
        return worker_info(vocab_size=300, max_model_len=1000)

    def load(self) -> WorkerLoad:
        return IDLE

    def submit(self, request: Request, kv: bytes | None, tell: Callable[[TokenChunk], None]) -> None:
        tell(TokenChunk(request_id=request.request_id, attempt=request.attempt, index=0, token_ids=(65,)))

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        pass

    async def until_engine_hangs(self, bound_s: float) -> float:
        await self.is_read.wait()
        await asyncio.sleep(0.0 if self.hangs else 3600.0)
        return bound_s + 1.0


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `end_hung_process` was called with, which would end this process."""
    calls: list[float] = []
    monkeypatch.setattr(monolithic, "end_hung_process", calls.append)
    return calls


async def serve(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Until the server has ended by itself; what a client that streams was sent."""

    @asynccontextmanager
    async def serving(_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(host=host, address="127.0.0.1:1")

    monkeypatch.setattr(monolithic, "serving", serving)
    monkeypatch.setattr(monolithic, "Tokenizer", SimpleNamespace(load=lambda path: ByteCodec()))
    listener = bind("127.0.0.1", 0)
    config = RouterConfig(model_name="m", model_path="none", drain_timeout_s=600.0)
    worker: Any = SimpleNamespace(info=host.info())
    server = asyncio.create_task(monolithic._serve(config, worker, listener))
    body = {"model": "m", "prompt": "hello", "max_tokens": 50, "stream": True}
    lines: list[str] = []
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60.0) as client,
        client.stream("POST", f"{url_of(listener)}/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            host.is_read.set()
            if not host.hangs:
                host.broken.set()
    await asyncio.wait_for(server, 60.0)  # far less than a drain may take
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


async def test_a_hung_engine_ends_the_process_after_its_clients(
    monkeypatch: pytest.MonkeyPatch, ended: list[float]
) -> None:
    first, *_, last = await serve(Host(hangs=True), monkeypatch)
    assert first["choices"][0]["text"] == "A"
    assert last["error"]["message"] == "this router is shutting down"
    assert ended == [HUNG_S + 1.0]


async def test_a_broken_engine_is_an_error_and_nothing_hangs(
    monkeypatch: pytest.MonkeyPatch, ended: list[float]
) -> None:
    with pytest.raises(StartupError, match="the engine thread ended"):
        await serve(Host(hangs=False), monkeypatch)
    assert not ended
