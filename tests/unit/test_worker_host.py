"""When a worker's drain is over, and what it still takes until then; a fake driver on a real engine thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from cluster.control import process
from cluster.control.host import WorkerHost
from cluster.control.messages import Cancel, Command, News, PeerAnswer, PeerQuestion, Submit, WorkerEvent
from cluster.errors import Overloaded
from cluster.types import FinishReason, Request, SamplingParams, TokenChunk
from tests.waiting import until
from tests.worker_info import IDLE, worker_info

WAIT_S = 60.0
REQUEST = Request(request_id="r", token_ids=(1, 2), sampling=SamplingParams(max_tokens=4, seed=0))


class FakeDriver:
    """Cancels what it is told to; `held` is what a real one has leased."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.num_held = 0
        self.blocks_on: threading.Event | None = None
        self._ended: list[TokenChunk] = []

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Submit(request):
                self.submitted.append(request)
            case Cancel(request_id, attempt):
                self._ended.append(terminal(request_id, attempt, FinishReason.CANCELLED))

    def turn(self, now: float) -> News:
        if self.blocks_on is not None:
            self.blocks_on.wait(WAIT_S)
        ended, self._ended = tuple(self._ended), []
        return News(events=ended, load=IDLE, num_held=self.num_held)

    def idle_s(self, now: float) -> float:
        return 0.01

    def close(self) -> None:
        pass


class FakeSession:
    def __init__(self) -> None:
        self.num_told = 0

    def on_drain(self) -> None:
        self.num_told += 1


def terminal(request_id: str, attempt: int, reason: FinishReason) -> TokenChunk:
    return TokenChunk(request_id=request_id, attempt=attempt, index=0, token_ids=(), finish_reason=reason)


async def nobody(question: PeerQuestion) -> PeerAnswer:
    raise AssertionError("no peers here")


@asynccontextmanager
async def running_host() -> AsyncIterator[tuple[WorkerHost, FakeDriver]]:
    driver = FakeDriver()
    host = WorkerHost(worker_info(), driver, max_requests=8, drain_timeout_s=30.0, ask=nobody)
    host.start()
    try:
        yield host, driver
    finally:
        await host.close()


async def is_drained(host: WorkerHost) -> bool:
    """After the engine has had time to say what it holds."""
    await asyncio.sleep(0.05)
    return host.drained.is_set()


async def test_an_idle_worker_has_drained_when_its_last_router_has_settled() -> None:
    async with running_host() as (host, _):
        first, second = FakeSession(), FakeSession()
        host.attach(first)
        host.attach(second)
        assert host.drain(None) == 0
        assert (first.num_told, second.num_told) == (1, 1)
        host.settle(first)
        assert not await is_drained(host)
        host.settle(second)
        assert host.drained.is_set()


async def test_a_session_that_cannot_take_its_event_costs_no_other_its_own() -> None:
    async with running_host() as (host, _):
        told: list[str] = []

        def broken(event: WorkerEvent) -> None:
            raise RuntimeError("this session is in trouble")

        def told_of(event: WorkerEvent) -> None:
            assert isinstance(event, TokenChunk)
            told.append(event.request_id)

        host.submit(msgspec.structs.replace(REQUEST, request_id="a"), None, broken)
        host.submit(msgspec.structs.replace(REQUEST, request_id="b"), None, told_of)
        for request_id in ("a", "b"):
            host.cancel(request_id, 0)
        await until(lambda: told == ["b"])
        host.drain(None)
        await until(host.drained.is_set)


async def test_without_routers_an_idle_worker_has_drained_at_once() -> None:
    async with running_host() as (host, _):
        host.drain(None)
        assert host.drained.is_set()


async def test_a_draining_worker_takes_what_an_unsettled_router_still_sends() -> None:
    async with running_host() as (host, driver):
        session, events = FakeSession(), asyncio.Queue[object]()
        host.attach(session)
        host.drain(None)
        host.submit(REQUEST, b"kv", events.put_nowait)
        host.settle(session)
        await until(lambda: driver.submitted == [REQUEST])
        assert not await is_drained(host)
        host.cancel("r", 0)
        assert await asyncio.wait_for(events.get(), WAIT_S) == terminal("r", 0, FinishReason.CANCELLED)
        assert host.drained.is_set()
        with pytest.raises(Overloaded, match="shutting down"):
            host.submit(REQUEST, None, events.put_nowait)


async def test_what_is_lent_holds_a_drain_up() -> None:
    async with running_host() as (host, driver):
        driver.num_held = 1
        await until(lambda: host._num_held == 1)
        host.drain(None)
        assert not await is_drained(host)
        driver.num_held = 0
        await asyncio.wait_for(host.drained.wait(), WAIT_S)


async def test_a_router_that_never_settles_is_waited_for_until_the_bound() -> None:
    async with running_host() as (host, _):
        session, events = FakeSession(), asyncio.Queue[object]()
        host.attach(session)
        host.submit(REQUEST, None, events.put_nowait)
        assert host.drain(0.05) == 1
        assert await asyncio.wait_for(events.get(), WAIT_S) == terminal("r", 0, FinishReason.CANCELLED)
        await asyncio.wait_for(host.drained.wait(), WAIT_S)
        with pytest.raises(Overloaded, match="shutting down"):
            host.submit(REQUEST, None, events.put_nowait)
        host.settle(session)


async def test_an_engine_that_hangs_is_noticed_and_one_that_idles_is_not() -> None:
    """In a library's call, say, that never returns: nothing is raised, and sessions go on saying that all is well."""
    async with running_host() as (host, driver):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(host.until_engine_hangs(1.0), 2.5)
        goes_on = threading.Event()
        driver.blocks_on = goes_on
        try:
            assert await asyncio.wait_for(host.until_engine_hangs(1.0), WAIT_S) > 1.0
        finally:
            goes_on.set()


def test_a_process_whose_engine_hangs_says_where_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    process.end_hung_process(301.0)
    told, log = capfd.readouterr()
    assert codes == [1]
    assert "the engine hangs: a step has lasted 301 s" in told
    assert "test_a_process_whose_engine_hangs_says_where_and_ends" in log
