"""The router's end of a session: one connection per worker, kept up for as long as it is wanted.

    connect(address, role) -> Connection      its task connects, reads frames, reconnects
    connection.decode(request, kv)            an async iterator fed by that task

A connection that breaks fails its iterators once with `WorkerLost` and is made anew; a worker that
comes back has a new engine_id in `info`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from cluster.errors import InvalidRequest, WorkerLost
from cluster.rpc import convert, limits
from cluster.rpc.base import PrefillEvent
from cluster.rpc.outbox import Outbox
from cluster.rpc.pb.serving.v1 import worker_pb2 as pb
from cluster.types import PrefillResult, PrefillStarted, Request, Role, TokenChunk, WorkerInfo, WorkerLoad

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

    _Call = StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]

logger = logging.getLogger(__name__)

_SESSION_METHOD = f"/{limits.SERVICE_NAME}/Session"
_Key = tuple[str, int]
_Event = PrefillStarted | PrefillResult | TokenChunk
_Inbox = asyncio.Queue[_Event | WorkerLost]


def connect(address: str, role: Role) -> Connection:
    """Start connecting and return at once; the worker may not listen yet. Needs a running event loop.
    The caller owns the connection and must `close` it."""
    return Connection(address, role)


class Connection:
    """A `WorkerConnection` (see `base.py`) over one gRPC stream, reconnecting until closed."""

    def __init__(self, address: str, role: Role) -> None:
        self.address = address
        self.role = role
        self._info: WorkerInfo | None = None
        self._load: WorkerLoad | None = None
        self._connected = False
        self._draining = False
        self.num_drains = 0
        self.num_promised = 0
        self._is_closing = False
        self._last_error = "not connected yet"
        self._silent_ticks = 0
        self._has_read_all = False  # of the session's frames
        self._inboxes: dict[_Key, _Inbox] = {}
        self._served: set[_Key] = set()  # of those: nothing more is wanted
        self._outbox = Outbox()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"worker {address}")

    @property
    def info(self) -> WorkerInfo | None:
        return self._info

    @property
    def load(self) -> WorkerLoad | None:
        return self._load

    @property
    def is_ready(self) -> bool:
        return self._connected and not self._draining

    @property
    def last_error(self) -> str:
        return "" if self._connected else self._last_error

    @contextmanager
    def promised(self) -> Iterator[None]:
        self.num_promised += 1
        try:
            yield
        finally:
            self.num_promised -= 1
            if self._draining:
                self._outbox.wake.set()  # to say that nothing more comes

    async def prefill(self, request: Request) -> AsyncGenerator[PrefillEvent, None]:
        with self._open(request, None) as inbox:
            while True:
                match await _next(inbox):
                    case TokenChunk(finish_reason=None):
                        raise AssertionError("a prefill worker streams no tokens")
                    case TokenChunk() as chunk:
                        yield PrefillResult(first=chunk, kv=None)
                        return
                    case PrefillResult() as result:
                        yield result
                        return
                    case started:
                        yield started

    async def decode(self, request: Request, kv: bytes | None) -> AsyncGenerator[TokenChunk, None]:
        with self._open(request, kv) as inbox:
            while True:
                event = await _next(inbox)
                assert isinstance(event, TokenChunk), "a decode worker sends chunks only"
                yield event
                if event.finish_reason is not None:
                    return

    def enough(self, request_id: str, attempt: int) -> None:
        if (request_id, attempt) in self._inboxes:
            self._served.add((request_id, attempt))

    def release(self, request_id: str, attempt: int) -> None:
        if self._connected:
            self._outbox.release((request_id, attempt))

    async def close(self) -> None:
        # Before 3.13 a TaskGroup loses a cancellation that coincides with the failure of a child.
        self._is_closing = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @contextmanager
    def _open(self, request: Request, kv: bytes | None) -> Iterator[_Inbox]:
        """Submit; on the way out cancel whatever has not ended on the worker."""
        if not self._connected:
            raise WorkerLost(f"{self.role.value} worker {self.address} is not connected: {self._last_error}")
        key = (request.request_id, request.attempt)
        if key in self._inboxes:
            raise ValueError(f"request {request.request_id} attempt {request.attempt} is already in flight")
        inbox = self._inboxes[key] = _Inbox()
        self._outbox.submit(request, kv)
        try:
            yield inbox
        finally:
            # the reader removes the inbox of a request that has ended, so what is left still runs
            is_served = key in self._served
            self._served.discard(key)
            if self._inboxes.pop(key, None) is not None:
                self._outbox.cancel(key, is_served=is_served)

    async def _run(self) -> None:
        pause_s = 0.0
        try:
            while not self._is_closing:
                await asyncio.sleep(pause_s)
                longer_s = min(max(2 * pause_s, limits.RECONNECT_MIN_S), limits.RECONNECT_MAX_S)
                try:
                    was_connected = await self._session()
                except Exception:  # a mistake of ours must not cost the worker until the router is restarted
                    logger.exception("the session with %s ended in an unexpected way", self.address)
                    was_connected = False
                    self._disconnected("its session ended in an unexpected way")
                pause_s = limits.RECONNECT_MIN_S if was_connected else longer_s
        finally:
            self._disconnected("the connection was closed")

    async def _session(self) -> bool:
        """One stream from connect to loss; True if the worker had introduced itself."""
        reason = ""
        async with grpc.aio.insecure_channel(self.address, options=limits.CHANNEL_OPTIONS) as channel:
            call: _Call = channel.stream_stream(
                _SESSION_METHOD,
                request_serializer=pb.RouterFrame.SerializeToString,
                response_deserializer=pb.WorkerFrame.FromString,
            )(None)
            self._silent_ticks, self._has_read_all = 0, False
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read_frames(call))
                    group.create_task(self._write_frames(call))
                    group.create_task(self._tick())
            except* (WorkerLost, InvalidRequest) as lost:
                reason = str(lost.exceptions[0])
            except* grpc.aio.AioRpcError as refused:
                first = refused.exceptions[0]
                assert isinstance(first, grpc.aio.AioRpcError)
                reason = f"{first.code().name.lower()}: {first.details()}"
        was_connected = self._connected
        self._disconnected(reason)
        return was_connected

    def _disconnected(self, reason: str) -> None:
        self._connected = False
        self._last_error = reason
        self._outbox.clear()
        lost = f"{self.role.value} worker {self.address} was lost: {reason}"
        for inbox in self._inboxes.values():
            inbox.put_nowait(WorkerLost(lost))
        self._inboxes.clear()

    async def _read_frames(self, call: _Call) -> None:
        while True:
            frame = await call.read()
            if not isinstance(frame, pb.WorkerFrame):
                raise WorkerLost("the worker ended the session")
            self._silent_ticks = 0
            if frame.HasField("hello"):
                self._introduce(convert.info_from_pb(frame.hello))
            if frame.HasField("load"):
                self._load = convert.load_from_pb(frame.load, () if self._load is None else self._load.histograms)
            if frame.draining and not self._draining:
                self.num_drains += 1
                self._outbox.wake.set()
            self._draining = frame.draining
            for event in frame.events:
                self._deliver(event)
            if frame.last:
                self._has_read_all = True
                self._outbox.wake.set()

    def _introduce(self, info: WorkerInfo) -> None:
        if info.role is not self.role:
            raise WorkerLost(f"expected a {self.role.value} worker, found a {info.role.value} worker")
        self._info = info
        self._load = None  # another process's counters
        self._connected = True

    def _deliver(self, event: pb.Event) -> None:
        """To the request's inbox; an event of a request that was left is dropped."""
        match event.WhichOneof("kind"):
            case "chunk":
                chunk = convert.chunk_from_pb(event.chunk)
                self._put((chunk.request_id, chunk.attempt), chunk, ends=chunk.finish_reason is not None)
            case "prefill_started":
                started = convert.started_from_pb(event.prefill_started)
                self._put((started.request_id, started.attempt), started, ends=False)
            case "prefill_result":
                result = convert.result_from_pb(event.prefill_result)
                self._put((result.first.request_id, result.first.attempt), result, ends=True)
            case _:
                return  # a kind of a later version

    def _put(self, key: _Key, event: _Event, *, ends: bool) -> None:
        inbox = self._inboxes.pop(key, None) if ends else self._inboxes.get(key)
        if inbox is not None:
            inbox.put_nowait(event)  # bounded by the request's max_tokens

    async def _write_frames(self, call: _Call) -> None:
        await _write(call, pb.RouterFrame(protocol_version=limits.PROTOCOL_VERSION))
        while True:
            frame = await self._outbox.next_frame()
            if self._has_read_all:
                await _write(call, None)
                return
            frame.settled = self._has_settled
            await _write(call, frame)

    @property
    def _has_settled(self) -> bool:
        """Nothing more will be submitted to the process at the other end. What is placed without a promise is in the
        outbox already."""
        return self._connected and self._draining and not self.num_promised and not self._outbox.has_submits

    async def _tick(self) -> None:
        """Send a heartbeat when there is nothing else to send, and notice a silent worker."""
        while True:
            await asyncio.sleep(limits.HEARTBEAT_S)
            self._silent_ticks += 1
            if self._silent_ticks >= limits.MAX_SILENT_TICKS:
                raise WorkerLost(f"nothing heard for {limits.HEARTBEAT_S * limits.MAX_SILENT_TICKS:g} s")
            self._outbox.wake.set()


async def _write(call: _Call, frame: pb.RouterFrame | None) -> None:
    """None: nothing more comes, and the worker ends the session. gRPC has its own errors for a call that ended before
    our reader was told, or while we wrote."""
    try:
        await (call.done_writing() if frame is None else call.write(frame))
    except (asyncio.InvalidStateError, grpc.aio.BaseError) as ended:
        raise WorkerLost("the worker ended the session") from ended


async def _next(inbox: _Inbox) -> _Event:
    event = await inbox.get()
    if isinstance(event, WorkerLost):
        raise event
    return event
