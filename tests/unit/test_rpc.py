"""Client and server over a real socket, with a fake worker behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import InvalidRequest, StartupError, WorkerLost
from cluster.launch.ports import choose_free_port
from cluster.rpc import client, convert, limits
from cluster.rpc.base import EventSink, Inspection, RouterSession
from cluster.rpc.client import Connection, connect
from cluster.rpc.pb.serving.v1 import worker_pb2 as pb
from cluster.rpc.server import WorkerServer
from cluster.rpc.session import _merge, _Pending
from cluster.types import (
    FinishReason,
    PrefillResult,
    PrefillStarted,
    Request,
    Role,
    SamplingParams,
    TokenChunk,
    WorkerInfo,
    WorkerLoad,
)
from tests.waiting import until
from tests.worker_info import worker_info


class FakeWorker:
    """Remembers what it was told; a test feeds the sinks."""

    is_draining = False

    def __init__(self, role: Role = Role.DECODE, engine_id: str = "engine-1") -> None:
        self.role, self.engine_id = role, engine_id
        self.sinks: dict[tuple[str, int], EventSink] = {}
        self.handles: dict[str, bytes | None] = {}
        self.cancelled: list[tuple[str, int]] = []
        self.served: list[tuple[str, int]] = []  # of those
        self.released: list[tuple[str, int]] = []
        self.unsettled: set[RouterSession] = set()

    def info(self) -> WorkerInfo:
        return worker_info(engine_id=self.engine_id, role=self.role)

    def load(self) -> WorkerLoad:
        return WorkerLoad(num_running=len(self.sinks), num_waiting=0, num_free_blocks=4, num_blocks=4)

    def submit(self, request: Request, kv: bytes | None, sink: EventSink) -> None:
        if request.tenant == "refused":
            raise InvalidRequest("no such tenant", param="tenant")
        self.sinks[request.request_id, request.attempt] = sink
        self.handles[request.request_id] = kv

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        self.cancelled.append((request_id, attempt))
        if is_served:
            self.served.append((request_id, attempt))

    def release(self, request_id: str, attempt: int) -> None:
        self.released.append((request_id, attempt))

    def drain(self, timeout_s: float | None) -> int:
        self.is_draining = True
        for session in self.unsettled:
            session.on_drain()
        return len(self.sinks)

    def attach(self, session: RouterSession) -> None:
        self.unsettled.add(session)

    def settle(self, session: RouterSession) -> None:
        self.unsettled.discard(session)

    async def inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection:
        return Inspection(num_blocks=4, num_free=4, num_owned=0, num_digest_tokens=len(token_ids))


def make_request(request_id: str = "r1", tenant: str = "", num_tokens: int = 3) -> Request:
    sampling = SamplingParams(max_tokens=8, seed=1)
    return Request(request_id=request_id, token_ids=(1,) * num_tokens, sampling=sampling, tenant=tenant)


def make_chunk(index: int, *tokens: int, request_id: str = "r1", finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(request_id=request_id, attempt=0, index=index, token_ids=tokens, finish_reason=finish)


@asynccontextmanager
async def connected(worker: FakeWorker, port: int = 0) -> AsyncIterator[tuple[Connection, WorkerServer, str]]:
    async with WorkerServer(worker, worker) as server:
        address = await server.listen("127.0.0.1", port)
        async with connection_to(address, worker.role) as connection:
            yield connection, server, address


@asynccontextmanager
async def connection_to(address: str, role: Role) -> AsyncIterator[Connection]:
    connection = connect(address, role)
    try:
        await until(lambda: connection.is_ready)
        yield connection
    finally:
        await connection.close()


async def test_decode_streams_in_order_and_the_handle_arrives() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        assert connection.info is not None
        assert connection.info.engine_id == "engine-1"
        stream = connection.decode(make_request(), b"handle")
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(worker.sinks))
        assert worker.handles["r1"] == b"handle"
        sink = worker.sinks["r1", 0]
        sink(make_chunk(0, 5))
        assert (await first).token_ids == (5,)
        sink(make_chunk(1, 6, 7))
        sink(make_chunk(3, 8, finish=FinishReason.LENGTH))
        rest = [chunk async for chunk in stream]
        assert [token for chunk in rest for token in chunk.token_ids] == [6, 7, 8]
        assert rest[-1].finish_reason is FinishReason.LENGTH
    assert worker.cancelled == []


async def test_prefill_yields_started_then_result_and_release_arrives() -> None:
    worker = FakeWorker(Role.PREFILL)
    async with connected(worker) as (connection, _, _):
        stream = connection.prefill(make_request())
        started = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(worker.sinks))
        sink = worker.sinks["r1", 0]
        sink(PrefillStarted(request_id="r1", attempt=0, kv=b"sealed"))
        assert (await started) == PrefillStarted(request_id="r1", attempt=0, kv=b"sealed")
        result = PrefillResult(first=make_chunk(0, 4), kv=b"sealed")
        sink(result)
        assert [event async for event in stream] == [result]
        connection.release("r1", 0)
        await until(lambda: worker.released == [("r1", 0)])


async def test_a_terminal_chunk_of_a_prefill_becomes_its_result() -> None:
    worker = FakeWorker(Role.PREFILL)
    async with connected(worker) as (connection, _, _):
        events = [event async for event in connection.prefill(make_request(tenant="refused"))]
    assert len(events) == 1
    assert isinstance(events[0], PrefillResult)
    error = events[0].first.error
    assert error is not None
    assert error.code == "invalid_request"


async def test_a_request_of_which_nothing_more_is_wanted_is_cancelled_as_served() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        streams = [connection.decode(make_request(name), None) for name in ("a", "b")]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: len(worker.sinks) == 2)
        for name, task in zip(("a", "b"), tasks, strict=True):
            worker.sinks[name, 0](make_chunk(0, 5, request_id=name))
            await task
        connection.enough("a", 0)
        connection.enough("unknown", 0)
        for stream in streams:
            await stream.aclose()
        await until(lambda: sorted(worker.cancelled) == [("a", 0), ("b", 0)])
        assert worker.served == [("a", 0)]


async def test_leaving_the_iterator_cancels_on_the_worker() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        stream = connection.decode(make_request(), None)
        task = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(worker.sinks))
        worker.sinks["r1", 0](make_chunk(0, 5))
        await task
        await stream.aclose()
        await until(lambda: worker.cancelled == [("r1", 0)])
        worker.sinks["r1", 0](make_chunk(1, 6))  # in flight already: dropped, harms nobody
        other = asyncio.ensure_future(anext(connection.decode(make_request("r2"), None)))
        await until(lambda: ("r2", 0) in worker.sinks)
        worker.sinks["r2", 0](make_chunk(0, 9, request_id="r2", finish=FinishReason.STOP))
        assert (await other).token_ids == (9,)


async def test_a_lost_worker_fails_each_iterator_once_and_a_new_one_is_found() -> None:
    worker = FakeWorker()
    port = choose_free_port("127.0.0.1")  # one that nobody is given while neither of the two listens
    async with connected(worker, port) as (connection, server, _):
        streams = [connection.decode(make_request(name), None) for name in ("a", "b")]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: len(worker.sinks) == 2)
        await server.close()
        for task in tasks:
            with pytest.raises(WorkerLost):
                await task
        for stream in streams:
            assert [chunk async for chunk in stream] == []  # raised once, then it is over
        assert not connection.is_ready
        with pytest.raises(WorkerLost):
            await anext(connection.decode(make_request("c"), None))
        successor = FakeWorker(engine_id="engine-2")
        async with WorkerServer(successor, successor) as restarted:
            await restarted.listen("127.0.0.1", port)
            await until(lambda: connection.is_ready)
            assert connection.info is not None
            assert connection.info.engine_id == "engine-2"
    assert sorted(worker.cancelled) == [("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    "failure", [asyncio.InvalidStateError("RPC already finished."), grpc.aio.UsageError("twice"), KeyError("a mistake")]
)
async def test_a_session_that_ends_while_the_router_writes_is_made_anew(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC says so in the write, before our reader has heard of it. Nothing may cost the worker for good."""
    plain = client._write
    failures = [failure]

    async def write(call: Any, frame: pb.RouterFrame) -> None:
        class Ended:
            async def write(self, frame: pb.RouterFrame) -> None:
                raise failures.pop()

        await plain(Ended() if frame.releases and failures else call, frame)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "_write", write)
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        stream = connection.decode(make_request(), None)
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: bool(worker.sinks))
        connection.release("other", 0)
        with pytest.raises(WorkerLost):
            await first
        await until(lambda: connection.is_ready)
        connection.release("again", 0)
        await until(lambda: worker.released == [("again", 0)])


async def test_a_request_that_is_submitted_twice_ends_its_session_and_no_other() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, address), connection_to(address, Role.DECODE) as bystander:
        stream, other = connection.decode(make_request("a"), None), bystander.decode(make_request("b"), None)
        tasks = [asyncio.ensure_future(anext(each)) for each in (stream, other)]
        await until(lambda: len(worker.sinks) == 2)
        connection._outbox.submit(make_request("a"), None)
        with pytest.raises(WorkerLost, match="is already running"):
            await tasks[0]
        worker.sinks["b", 0](make_chunk(0, 9, request_id="b", finish=FinishReason.STOP))
        assert (await tasks[1]).token_ids == (9,)
        assert worker.cancelled == [("a", 0)]


async def test_closing_the_connection_cancels_its_requests() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        task = asyncio.ensure_future(anext(connection.decode(make_request(), None)))
        await until(lambda: bool(worker.sinks))
        await connection.close()
        with pytest.raises(WorkerLost):
            await task
        await until(lambda: worker.cancelled == [("r1", 0)])


async def test_a_silent_worker_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts TCP connections and says nothing, like a stopped process."""
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.02)
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    connection = connect(f"127.0.0.1:{port}", Role.DECODE)
    await until(lambda: "nothing heard" in connection.last_error)
    await connection.close()
    silent.close()


async def test_a_worker_of_the_wrong_role_is_not_ready() -> None:
    worker = FakeWorker(Role.PREFILL)
    async with WorkerServer(worker, worker) as server:
        connection = connect(await server.listen("127.0.0.1", 0), Role.DECODE)
        await until(lambda: "expected a decode worker" in connection.last_error)
        assert not connection.is_ready
        await connection.close()


async def test_draining_is_seen_by_the_router_and_by_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.05)
    worker = FakeWorker()
    async with connected(worker) as (connection, server, address), grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=limits.SERVICE_NAME)
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        worker.drain(None)
        await server.set_serving(False)
        await until(lambda: not connection.is_ready)
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_router_settles_when_what_it_promised_has_come_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_S", 60.0)  # nothing here waits for one
    worker = FakeWorker()
    async with connected(worker) as (connection, _, address), connection_to(address, worker.role):
        await until(lambda: len(worker.unsettled) == 2)
        with connection.promised():
            worker.drain(None)
            await until(lambda: not connection.is_ready and len(worker.unsettled) == 1)
            stream = connection.decode(make_request(), b"kv")
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: bool(worker.sinks))
            assert len(worker.unsettled) == 1
        await until(lambda: not worker.unsettled)
        worker.sinks["r1", 0](make_chunk(0, 1, finish=FinishReason.STOP))
        assert (await first).finish_reason is FinishReason.STOP


async def test_a_session_that_ends_has_settled() -> None:
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        with connection.promised():
            worker.drain(None)
            await until(lambda: not connection.is_ready)
            assert worker.unsettled
            await connection.close()
            await until(lambda: not worker.unsettled)


async def test_a_worker_that_is_back_is_not_told_that_its_router_has_settled() -> None:
    """The drain of the process before it is none of its own."""
    first, second = FakeWorker(), FakeWorker(engine_id="engine-2")
    port = choose_free_port("127.0.0.1")
    async with connected(first, port) as (connection, server, _):
        first.drain(None)
        await until(lambda: not first.unsettled)
        await server.close()
        async with WorkerServer(second, second) as again:
            await again.listen("127.0.0.1", port)
            await until(lambda: connection.is_ready)
            with connection.promised():
                stream = connection.decode(make_request(), None)
                pending = asyncio.ensure_future(anext(stream))
                await until(lambda: bool(second.sinks))
                assert second.unsettled
                second.sinks["r1", 0](make_chunk(0, 1, finish=FinishReason.STOP))
                await pending


async def test_a_taken_port_is_named() -> None:
    worker = FakeWorker()
    async with WorkerServer(worker, worker) as first, WorkerServer(worker, worker) as second:
        address = await first.listen("127.0.0.1", 0)
        port = int(address.rpartition(":")[2])
        with pytest.raises(StartupError, match=str(port)):
            await second.listen("127.0.0.1", port)


async def test_many_large_requests_are_split_into_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FRAME_ENTRIES", 1000)
    worker = FakeWorker()
    async with connected(worker) as (connection, _, _):
        streams = [connection.decode(make_request(f"r{at}", num_tokens=700), None) for at in range(20)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await until(lambda: len(worker.sinks) == 20)
        for (request_id, _), sink in worker.sinks.items():
            sink(make_chunk(0, 1, request_id=request_id, finish=FinishReason.STOP))
        assert all(chunk.finish_reason for chunk in await asyncio.gather(*tasks))


def test_pending_chunks_of_one_request_are_merged_in_order() -> None:
    pending = _Pending()
    pending.add(make_chunk(0, 1))
    pending.add(make_chunk(0, 7, request_id="r2"))
    pending.add(make_chunk(1, 2, 3))
    pending.add(make_chunk(3, finish=FinishReason.STOP))
    taken = pending.take()
    assert taken == [make_chunk(0, 1, 2, 3, finish=FinishReason.STOP), make_chunk(0, 7, request_id="r2")]
    assert pending.take() == []
    assert pending.num_entries == 0
    with pytest.raises(AssertionError):
        _merge(make_chunk(0, 1), make_chunk(2, 2))  # a gap


def test_pending_is_cut_at_the_frame_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FRAME_ENTRIES", 4)
    pending = _Pending()
    for name in ("a", "b", "c"):
        pending.add(make_chunk(0, 1, 2, request_id=name))
    assert [event.request_id for event in pending.take() if isinstance(event, TokenChunk)] == ["a"]
    pending.add(make_chunk(2, 3, request_id="b"))
    rest = []
    while pending.wake.is_set():
        rest += pending.take()
    assert rest == [make_chunk(0, 1, 2, 3, request_id="b"), make_chunk(0, 1, 2, request_id="c")]


async def read_to_the_end(call: AsyncIterable[object]) -> None:
    async for _ in call:
        pass


async def test_a_router_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is owed stays bounded, and its requests are cancelled."""
    monkeypatch.setattr(limits, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(limits, "MAX_SILENT_TICKS", 10_000)
    monkeypatch.setattr(limits, "MAX_PENDING_ENTRIES", 50_000)
    worker = FakeWorker()
    async with WorkerServer(worker, worker) as server:
        address = await server.listen("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(
                f"/{limits.SERVICE_NAME}/Session",
                request_serializer=pb.RouterFrame.SerializeToString,
                response_deserializer=pb.WorkerFrame.FromString,
            )(None)
            submit = pb.Submit(request=convert.request_to_pb(make_request()))
            await call.write(pb.RouterFrame(protocol_version=limits.PROTOCOL_VERSION, submits=[submit]))
            await until(lambda: bool(worker.sinks))
            sink, index = worker.sinks["r1", 0], 0
            while not worker.cancelled and index < 10_000_000:
                sink(make_chunk(index, *[7] * 10_000))
                index += 10_000
                await asyncio.sleep(0)
            assert worker.cancelled == [("r1", 0)]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_router_of_another_version_is_told() -> None:
    worker = FakeWorker()
    async with WorkerServer(worker, worker) as server:
        address = await server.listen("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(
                f"/{limits.SERVICE_NAME}/Session",
                request_serializer=pb.RouterFrame.SerializeToString,
                response_deserializer=pb.WorkerFrame.FromString,
            )(None)
            await call.write(pb.RouterFrame(protocol_version=99))
            await call.read()  # hello
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "99" in (caught.value.details() or "")
