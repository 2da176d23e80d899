"""How a worker's sessions end with it: a router that stands still for a while loses nothing of what was written."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cluster.errors import WorkerLost
from cluster.rpc import limits
from cluster.rpc.client import Connection
from cluster.rpc.server import WorkerServer
from cluster.types import FinishReason, TokenChunk
from tests.unit.test_rpc import FakeWorker, connection_to, make_chunk, make_request
from tests.waiting import until

NUM_TOKENS = 200_000  # in a chunk: more than the buffers between the two take
NUM_CHUNKS = 5


@asynccontextmanager
async def connected_over(may_pass: asyncio.Event, worker: FakeWorker) -> AsyncIterator[tuple[Connection, WorkerServer]]:
    """What the worker says reaches the router only while `may_pass` is set."""
    async with WorkerServer(worker, worker) as server:
        host, _, port = (await server.listen("127.0.0.1", 0)).rpartition(":")

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_held: bool) -> None:
            with suppress(ConnectionError):
                while piece := await reader.read(1 << 14):
                    if is_held:
                        await may_pass.wait()
                    writer.write(piece)
                    await writer.drain()
            writer.close()

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            of_worker, to_worker = await asyncio.open_connection(host, int(port))
            await asyncio.gather(pass_on(reader, to_worker, False), pass_on(of_worker, writer, True))

        async with await asyncio.start_server(between, "127.0.0.1", 0) as proxy:
            proxy_port = proxy.sockets[0].getsockname()[1]
            async with connection_to(f"127.0.0.1:{proxy_port}", worker.role) as connection:
                try:
                    yield connection, server
                finally:
                    may_pass.set()


@asynccontextmanager
async def last_frames_held(
    worker: FakeWorker,
) -> AsyncIterator[tuple[asyncio.Task[list[TokenChunk]], WorkerServer, asyncio.Event]]:
    """A request whose answer has been given to the session and has not reached the router."""
    may_pass = asyncio.Event()
    may_pass.set()
    async with connected_over(may_pass, worker) as (connection, server):

        async def read() -> list[TokenChunk]:
            return [chunk async for chunk in connection.decode(make_request(), None)]

        reading = asyncio.create_task(read())
        await until(lambda: bool(worker.sinks))
        may_pass.clear()
        sink = worker.sinks["r1", 0]
        for index in range(0, NUM_CHUNKS * NUM_TOKENS, NUM_TOKENS):
            sink(make_chunk(index, *[5] * NUM_TOKENS))
            await asyncio.sleep(0.05)  # it is on its way, so that the next is a frame of its own
        sink(make_chunk(NUM_CHUNKS * NUM_TOKENS, 6, finish=FinishReason.STOP))
        yield reading, server, may_pass


async def test_a_router_that_stands_still_reads_the_last_frames_when_it_goes_on() -> None:
    async with last_frames_held(FakeWorker()) as (reading, server, may_pass):
        closing = asyncio.create_task(server.close(grace_s=30.0))
        await asyncio.sleep(0.5)
        assert not closing.done()
        may_pass.set()
        chunks = await reading
        assert sum(len(chunk.token_ids) for chunk in chunks) == NUM_CHUNKS * NUM_TOKENS + 1
        assert chunks[-1].finish_reason is FinishReason.STOP
        async with asyncio.timeout(10.0):  # of 30: it ends as soon as all is written
            await closing


_ROUTER = """
import asyncio, sys
from tests.unit.test_rpc import FakeWorker, connection_to, make_request

async def read(address):
    async with connection_to(address, FakeWorker().role) as connection:
        chunks = [chunk async for chunk in connection.decode(make_request(), None)]
        print(sum(len(chunk.token_ids) for chunk in chunks), chunks[-1].finish_reason.value)

asyncio.run(read(sys.argv[1]))
"""


async def test_a_router_that_is_stopped_for_longer_than_a_heartbeat_reads_the_last_frames() -> None:
    """When it goes on, a heartbeat of its own is due before it has read what has come."""
    worker = FakeWorker()
    async with WorkerServer(worker, worker) as server:
        address = await server.listen("127.0.0.1", 0)
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _ROUTER, address, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        try:
            await until(lambda: bool(worker.sinks), timeout_s=60.0)
            router.send_signal(signal.SIGSTOP)
            sink = worker.sinks["r1", 0]
            for index in range(50):
                sink(make_chunk(index, 5))
                await asyncio.sleep(0.01)  # a frame for each
            sink(make_chunk(50, 6, finish=FinishReason.STOP))
            closing = asyncio.create_task(server.close(grace_s=30.0))
            await asyncio.sleep(3 * limits.HEARTBEAT_S)
            assert not closing.done()
            router.send_signal(signal.SIGCONT)
            async with asyncio.timeout(20.0):
                await closing
                read, _ = await router.communicate()
        finally:
            with suppress(ProcessLookupError):
                router.kill()
        assert read.decode() == "51 stop\n"


async def test_a_router_that_never_goes_on_does_not_keep_the_worker() -> None:
    async with last_frames_held(FakeWorker()) as (reading, server, may_pass):
        async with asyncio.timeout(20.0):
            await server.close(grace_s=0.3)
        may_pass.set()
        with suppress(WorkerLost):  # or it finds all in the buffers between the two
            await reading


async def test_sessions_end_at_once_where_nothing_is_pending() -> None:
    worker = FakeWorker()
    async with WorkerServer(worker, worker) as server:
        address = await server.listen("127.0.0.1", 0)
        async with connection_to(address, worker.role) as connection:
            async with asyncio.timeout(20.0):
                await server.close(grace_s=60.0)
            await until(lambda: not connection.is_ready)
            assert "ended the session" in connection.last_error
