"""The event loop's half of a worker: what `cluster/rpc/server.py` talks to.

It knows the sink of every request, hands commands to the engine thread and its news to the sinks, and
decides when a drain is over. It computes nothing and never waits for the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cluster.control.messages import (
    Cancel,
    Command,
    Inspect,
    News,
    PeerAnswer,
    PeerQuestion,
    Release,
    Submit,
    WorkerEvent,
)
from cluster.engine.loop import Driver, EngineThread
from cluster.errors import InvalidRequest, Overloaded, WorkerLost
from cluster.rpc.base import EventSink, Inspection, RouterSession
from cluster.types import FinishReason, PrefillResult, Request, TokenChunk, WorkerInfo, WorkerLoad

logger = logging.getLogger(__name__)

Ask = Callable[[PeerQuestion], Awaitable[PeerAnswer]]
INSPECT_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
LOOK_S = 5.0  # how often it is looked whether the engine goes on
_Key = tuple[str, int]


class WorkerHost:
    """A `WorkerService` and `WorkerAdmin` (cluster/rpc/base.py). Event loop only.

    `ask` carries out handshakes (decode workers); it answers in bounded time and never raises.
    """

    def __init__(
        self, info: WorkerInfo, driver: Driver[Command, News], *, max_requests: int, drain_timeout_s: float, ask: Ask
    ) -> None:
        self._info = info
        self._max_requests = max_requests
        self._drain_timeout_s = drain_timeout_s
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(driver, self._publish, self._on_thread_exit)
        self._sinks: dict[_Key, EventSink] = {}
        self._unsettled: set[RouterSession] = set()
        self._load = WorkerLoad(
            num_running=0, num_waiting=0, num_free_blocks=info.num_blocks, num_blocks=info.num_blocks
        )
        self._num_held = 0
        self._inspections: dict[int, asyncio.Future[Inspection]] = {}
        self._num_inspections = 0
        self._asking: set[asyncio.Task[None]] = set()
        self._drain_timer: asyncio.TimerHandle | None = None
        self.drained = asyncio.Event()  # draining, and nothing is left
        self.broken = asyncio.Event()  # the engine thread died

    # ---- WorkerService

    def info(self) -> WorkerInfo:
        return self._info

    def load(self) -> WorkerLoad:
        return self._load

    def submit(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        key = (request.request_id, request.attempt)
        if key in self._sinks:
            raise InvalidRequest(f"request {key[0]} attempt {key[1]} is running already", param="request_id")
        if self.is_draining and not self._unsettled:
            raise Overloaded("this worker is shutting down")
        if len(self._sinks) >= self._max_requests:
            raise Overloaded(f"this worker has {self._max_requests} requests already")
        self._sinks[key] = sink
        self._thread.send(Submit(request, kv))

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        self._thread.send(Cancel(request_id, attempt, is_served))

    def release(self, request_id: str, attempt: int) -> None:
        self._thread.send(Release(request_id, attempt))

    # ---- WorkerAdmin

    @property
    def is_draining(self) -> bool:
        return self._drain_timer is not None

    def drain(self, timeout_s: float | None) -> int:
        bound_s = self._drain_timeout_s if timeout_s is None else max(timeout_s, 0.0)
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._drain_timer = self._loop.call_later(bound_s, self._cancel_all)
        for session in self._unsettled:
            session.on_drain()
        self._check_drained()
        return len(self._sinks)

    def attach(self, session: RouterSession) -> None:
        self._unsettled.add(session)

    def settle(self, session: RouterSession) -> None:
        self._unsettled.discard(session)
        self._check_drained()

    async def inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection:
        """Raises `WorkerLost` if the engine thread does not answer in time."""
        self._num_inspections += 1
        number = self._num_inspections
        future = self._inspections[number] = self._loop.create_future()
        self._thread.send(Inspect(number, token_ids, cache_salt))
        try:
            return await asyncio.wait_for(future, INSPECT_TIMEOUT_S)
        except TimeoutError as error:
            raise WorkerLost(f"the engine did not answer within {INSPECT_TIMEOUT_S:g} s") from error
        finally:
            del self._inspections[number]

    # ---- the process

    def start(self) -> None:
        self._thread.start()

    async def until_engine_hangs(self, bound_s: float) -> float:
        """Returns how long a turn has lasted, once that is more than `bound_s`. A thread that hangs in a library or in
        the device raises nothing, while everything else of this process goes on to say that it is well."""
        while (turn_s := self._thread.turn_s()) <= bound_s:  # noqa: ASYNC110  who hangs sets no event
            await asyncio.sleep(min(LOOK_S, bound_s / 4))
        return turn_s

    async def close(self) -> None:
        """Stop the engine thread; whoever still waits for events gets none."""
        for task in self._asking:
            task.cancel()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        if not await asyncio.to_thread(self._thread.stop, STOP_TIMEOUT_S):
            logger.error("the engine did not stop within %g s", STOP_TIMEOUT_S)

    # ---- called on the engine thread

    def _publish(self, news: News) -> None:
        self._loop.call_soon_threadsafe(self._on_news, news)

    def _on_thread_exit(self, was_asked: bool) -> None:
        if not was_asked:
            self._loop.call_soon_threadsafe(self.broken.set)

    # ---- called on the event loop

    def _on_news(self, news: News) -> None:
        self._load = news.load
        self._num_held = news.num_held
        for event in news.events:
            try:
                self._pass_on(event)
            except Exception:  # of one session: what others wait for must reach them
                logger.exception("an event was not passed on: %s", type(event).__name__)
        for number, inspection in news.inspections:
            future = self._inspections.get(number)
            if future is not None and not future.done():
                future.set_result(inspection)
        for question in news.questions:
            task = self._loop.create_task(self._answer(question))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        self._check_drained()

    def _pass_on(self, event: WorkerEvent) -> None:
        match event:
            case PrefillResult(first=chunk) | (TokenChunk(finish_reason=FinishReason()) as chunk):
                sink = self._sinks.pop((chunk.request_id, chunk.attempt))
            case _:
                sink = self._sinks[event.request_id, event.attempt]
        sink(event)

    async def _answer(self, question: PeerQuestion) -> None:
        self._thread.send(await self._ask(question))

    def _check_drained(self) -> None:
        if self.is_draining and not self._sinks and not self._num_held and not self._unsettled:
            self.drained.set()

    def _cancel_all(self) -> None:
        """The drain has taken too long: what still runs is cancelled, leases and loads are given up."""
        logger.warning(
            "drain: %d requests and %d hand-overs did not end in time, %d routers had more to send",
            len(self._sinks),
            self._num_held,
            len(self._unsettled),
        )
        self._unsettled.clear()
        for key in self._sinks:
            self._thread.send(Cancel(*key))
        self._loop.call_later(1.0, self.drained.set)
