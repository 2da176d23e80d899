"""One router's session with this worker, the server's side.

The sinks of all requests write into `_Pending`; whenever the stream takes another frame, everything
that has gathered becomes one. In the normal case that is one frame per engine step; while the router
reads slowly, chunks of the same request are merged, and beyond a bound the session is ended.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from cluster.errors import Overloaded, TandemError
from cluster.rpc import convert, limits
from cluster.rpc.base import WorkerAdmin, WorkerService, refused
from cluster.rpc.pb.serving.v1 import worker_pb2
from cluster.types import (
    FinishReason,
    HistogramReading,
    PrefillResult,
    PrefillStarted,
    TokenChunk,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

LAST_WRITE_S = 1.0  # for a frame that is on its way when a session ends

_Key = tuple[str, int]
_Event = PrefillStarted | PrefillResult | TokenChunk
_Context = grpc.aio.ServicerContext[worker_pb2.RouterFrame, worker_pb2.WorkerFrame]


class _SessionEnded(Exception):
    """Leaves the session's task group; the text is for the router."""

    def __init__(self, status: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Session:
    """Lives as long as one `Session` call."""

    def __init__(self, service: WorkerService, admin: WorkerAdmin) -> None:
        self._service = service
        self._admin = admin
        self._running: set[_Key] = set()
        self._pending = _Pending()
        self._silent_ticks = 0
        self._is_finishing = False
        self._write: asyncio.Task[None] | None = None

    async def serve(self, context: _Context) -> None:
        """Until the router leaves, falls silent or breaks a rule, or after `finish`. Cancels what still runs on the way
        out."""
        ended: _SessionEnded | None = None
        self._admin.attach(self)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_frames(context))
                group.create_task(self._write_frames(context))
                group.create_task(self._tick())
        except* _SessionEnded as endings:
            first = endings.exceptions[0]
            assert isinstance(first, _SessionEnded)
            ended = first
        except* grpc.aio.BaseError as broken:
            logger.debug("a session broke: %s", broken.exceptions[0])
        finally:
            for key in tuple(self._running):
                self._service.cancel(*key)
            self._admin.settle(self)
        await self._last_write_ends()
        if ended is not None and ended.status is not grpc.StatusCode.OK:
            await context.abort(ended.status, str(ended))

    def on_drain(self) -> None:
        self._pending.wake.set()

    def finish(self) -> None:
        """The session ends once what is pending is written and the router has read it: it closes the stream after the
        frame that says `last`. Were it closed here, a router that had stood still would write its heartbeat first when
        it goes on, and what gRPC answers to that drops the frames which it has not read."""
        self._is_finishing = True
        self._pending.wake.set()

    async def _read_frames(self, context: _Context) -> None:
        first = await context.read()
        if not isinstance(first, worker_pb2.RouterFrame):
            raise _SessionEnded(grpc.StatusCode.OK, "")
        if first.protocol_version != limits.PROTOCOL_VERSION:
            reason = f"protocol version {first.protocol_version}, this worker speaks {limits.PROTOCOL_VERSION}"
            raise _SessionEnded(grpc.StatusCode.FAILED_PRECONDITION, reason)
        frame = first
        while True:
            self._silent_ticks = 0
            for submit in frame.submits:
                self._submit(submit)
            for ref in frame.cancels:
                self._service.cancel(ref.request_id, ref.attempt, is_served=ref.served)
            for ref in frame.releases:
                self._service.release(ref.request_id, ref.attempt)
            if frame.settled:
                self._admin.settle(self)
            frame = await context.read()
            if not isinstance(frame, worker_pb2.RouterFrame):
                raise _SessionEnded(grpc.StatusCode.OK, "")

    def _submit(self, submit: worker_pb2.Submit) -> None:
        """Hand over to the worker; what cannot be accepted is answered with a terminal event."""
        key = (submit.request.request_id, submit.request.attempt)
        if key in self._running:  # whatever it were answered with would end the one that runs
            raise _SessionEnded(
                grpc.StatusCode.INVALID_ARGUMENT, f"request {key[0]} attempt {key[1]} is already running"
            )
        try:
            request = convert.request_from_pb(submit.request)
            if len(self._running) >= limits.MAX_REQUESTS_PER_SESSION:
                raise Overloaded(f"a session carries at most {limits.MAX_REQUESTS_PER_SESSION} requests")
            self._service.submit(request, submit.kv if submit.HasField("kv") else None, self._sink)
        except TandemError as refusal:
            self._pending.add(refused(*key, refusal))
        else:
            self._running.add(key)

    def _sink(self, event: _Event) -> None:
        match event:
            case PrefillResult(first=chunk):
                self._running.discard((chunk.request_id, chunk.attempt))
            case TokenChunk(finish_reason=FinishReason()):
                self._running.discard((event.request_id, event.attempt))
        self._pending.add(event)

    async def _write_frames(self, context: _Context) -> None:
        frame = worker_pb2.WorkerFrame(hello=convert.info_to_pb(self._service.info()))
        told: tuple[HistogramReading, ...] = ()
        while True:
            load = self._service.load()
            frame.load.CopyFrom(convert.load_to_pb(load, with_histograms=load.histograms is not told))
            told = load.histograms
            frame.draining = self._admin.is_draining
            frame.last = self._is_finishing and not self._pending.num_entries
            self._write = asyncio.ensure_future(context.write(frame))
            self._write.add_done_callback(_note_end)
            await asyncio.shield(self._write)
            if frame.last:
                return
            await self._pending.wake.wait()
            frame = _frame_of(self._pending.take())

    async def _last_write_ends(self) -> None:
        """Cancelling a write does not take it back from gRPC's core, which then refuses the call's status
        ("too many operations") and leaves the router waiting; so it is never cancelled, but waited for."""
        if self._write is None:
            return
        await asyncio.wait({self._write}, timeout=LAST_WRITE_S)

    async def _tick(self) -> None:
        """A heartbeat when there is nothing else to write; notices a router that is silent or stuck."""
        while True:
            await asyncio.sleep(limits.HEARTBEAT_S)
            self._silent_ticks += 1
            if self._silent_ticks >= 2 * limits.MAX_SILENT_TICKS:
                raise _SessionEnded(grpc.StatusCode.DEADLINE_EXCEEDED, "the router fell silent")
            if self._pending.num_entries > limits.MAX_PENDING_ENTRIES:
                raise _SessionEnded(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router reads too slowly")
            self._pending.wake.set()


def _note_end(write: asyncio.Task[None]) -> None:
    """Also of one that ends when nobody waits any more: of a process that was paused, say."""
    if not write.cancelled() and (broken := write.exception()) is not None:
        logger.debug("a frame of a session was not written: %s", broken)


class _Pending:
    """Events that wait for the stream, in order; at most one unfinished chunk per request."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.num_entries = 0
        self._events: list[_Event] = []
        self._chunk_at: dict[_Key, int] = {}  # index in _events of the request's chunk

    def add(self, event: _Event) -> None:
        self.wake.set()
        if isinstance(event, TokenChunk):
            key = (event.request_id, event.attempt)
            at = self._chunk_at.get(key)
            if at is not None:
                earlier = self._events[at]
                assert isinstance(earlier, TokenChunk)
                merged = self._events[at] = _merge(earlier, event)
                self.num_entries += _num_entries(merged) - _num_entries(earlier)
                return
            self._chunk_at[key] = len(self._events)
        self._events.append(event)
        self.num_entries += _num_entries(event)

    def take(self) -> list[_Event]:
        """Everything, up to MAX_FRAME_ENTRIES (or one event); the rest stays and wakes the writer again."""
        count, entries = 0, 0
        for event in self._events:
            entries += _num_entries(event)
            if count and entries > limits.MAX_FRAME_ENTRIES:
                entries -= _num_entries(event)
                break
            count += 1
        taken, self._events = self._events[:count], self._events[count:]
        self.num_entries -= entries
        self._chunk_at = {
            (event.request_id, event.attempt): at
            for at, event in enumerate(self._events)
            if isinstance(event, TokenChunk)
        }
        self.wake.clear()
        if self._events:
            self.wake.set()
        return taken


def _merge(earlier: TokenChunk, later: TokenChunk) -> TokenChunk:
    """Two consecutive chunks of one request as one."""
    assert earlier.finish_reason is None, "nothing follows a terminal chunk"
    assert later.index == earlier.index + len(earlier.token_ids) or not later.token_ids
    return TokenChunk(
        request_id=earlier.request_id,
        attempt=earlier.attempt,
        index=earlier.index,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        finish_reason=later.finish_reason,
        stop_token_id=later.stop_token_id,
        error=later.error,
        num_cached_tokens=earlier.num_cached_tokens,
        prompt_logprobs=earlier.prompt_logprobs,
    )


def _num_entries(event: _Event) -> int:
    """Size of an event in tokens and alternatives, at least 1."""
    match event:
        case PrefillStarted():
            return 1
        case PrefillResult():
            return _num_entries(event.first) + _num_logprobs(event.prompt_logprobs)
        case TokenChunk():
            count = 1 + len(event.token_ids)
            if event.logprobs or event.prompt_logprobs:
                count += _num_logprobs(event.logprobs) + _num_logprobs(event.prompt_logprobs)
            return count


def _num_logprobs(logprobs: tuple[TokenLogprob | None, ...]) -> int:
    return sum(1 + len(entry.top) for entry in logprobs if entry is not None)


def _frame_of(events: list[_Event]) -> worker_pb2.WorkerFrame:
    frame = worker_pb2.WorkerFrame()
    for event in events:
        match event:
            case TokenChunk():
                convert.fill_chunk(frame.events.add().chunk, event)
            case PrefillStarted():
                frame.events.add(prefill_started=convert.started_to_pb(event))
            case PrefillResult():
                frame.events.add(prefill_result=convert.result_to_pb(event))
    return frame
