"""How a router with its engine in the same process ends when that engine does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import StartupError
from cluster.launch import monolithic
from cluster.router.config import RouterConfig
from cluster.router.server import Stop


class FakeHost:
    """`hung_after_s` None: it never hangs."""

    def __init__(self, hung_after_s: float | None) -> None:
        self.broken = asyncio.Event()
        self._hung_after_s = hung_after_s

    async def until_engine_hangs(self, bound_s: float) -> float:
        await asyncio.sleep(3600.0 if self._hung_after_s is None else self._hung_after_s)
        return bound_s + 1.0


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serves with a host and a router that runs until it is told to end at once; what happened, in order."""
    happened: list[Any] = []

    async def run_router(*_: Any, stop: Stop, **__: Any) -> None:
        await stop.forced.wait()
        happened.append("clients have their last events")

    def fake_serving(host: FakeHost) -> Any:
        @asynccontextmanager
        async def serving(_: Any) -> AsyncIterator[Any]:
            yield SimpleNamespace(host=host, address="127.0.0.1:1")

        return serving

    async def run(host: FakeHost) -> list[Any]:
        monkeypatch.setattr(monolithic, "serving", fake_serving(host))
        monkeypatch.setattr(monolithic, "run_router", run_router)
        monkeypatch.setattr(monolithic, "EmbeddedConnection", lambda host: host)
        monkeypatch.setattr(monolithic, "end_hung_process", happened.append)
        monkeypatch.setattr(monolithic, "Tokenizer", SimpleNamespace(load=lambda path: None))
        worker: Any = SimpleNamespace(info=SimpleNamespace(num_blocks=1, block_size=16))
        with socket.socket() as listener:
            await monolithic._serve(RouterConfig(model_name="m", model_path="none"), worker, listener)
        return happened

    return run


async def test_a_hung_engine_ends_the_process_after_its_clients(serve: Any) -> None:
    assert await asyncio.wait_for(serve(FakeHost(0.05)), 5.0) == ["clients have their last events", 301.0]


async def test_a_broken_engine_is_an_error_and_nothing_hangs(serve: Any) -> None:
    host = FakeHost(None)
    host.broken.set()
    with pytest.raises(StartupError, match="the engine thread ended"):
        await asyncio.wait_for(serve(host), 5.0)
