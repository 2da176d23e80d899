"""The router as a server inside a running event loop: bind, serve, drain.

uvicorn speaks HTTP; `connection.py` bounds what it leaves unbounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial

import uvicorn

from cluster.addresses import join_address
from cluster.errors import StartupError
from cluster.listening import family_of, why_not_listening
from cluster.router.config import RouterConfig
from cluster.router.connection import protocol_class
from cluster.router.endpoints import Endpoints
from cluster.router.http import NO_HANDLER, make_app
from cluster.router.pool import WorkerPool
from cluster.router.text import Codec
from cluster.rpc.base import WorkerConnection
from cluster.stop import Stop

log = logging.getLogger(__name__)

BACKLOG = 2048
DRAIN_SHARE = 0.8  # of the drain timeout for requests to finish; the rest is for telling those that did not
CLEANUP_S = 5.0  # for cancelled requests to tell the workers


class _Server(uvicorn.Server):
    """Signals belong to the process that runs the event loop, not to a server in it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before anything slow is started. Raises `StartupError` with the way out."""
    # With the protocol's number, by which asyncio knows to disable Nagle.
    listener = socket.socket(family_of(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(why_not_listening(error, host, port, "router.port")) from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{join_address(host, port)}"


async def run_router(
    config: RouterConfig,
    codec: Codec,
    *,
    prefill: Sequence[WorkerConnection] | None,
    decode: Sequence[WorkerConnection],
    listener: socket.socket,
    stop: Stop,
    on_ready: Callable[[str], None],
    follow_members: Callable[[WorkerPool], Coroutine[None, None, None]] | None = None,
) -> None:
    """Serve until `stop`, drain for at most `drain_timeout_s`, close listener and connections.

    `prefill` None means that decode workers compute prompts themselves. Takes ownership of the
    connections and of `listener` (see `bind`). `on_ready` gets the URL once requests are accepted.
    `follow_members` runs beside the server until its end and lets workers join and leave the pool.
    """
    endpoints = Endpoints(config, codec, WorkerPool(prefill=prefill, decode=decode))
    following = asyncio.ensure_future(_never() if follow_members is None else follow_members(endpoints.pool))
    server = _Server(_uvicorn_config(config, endpoints))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.requested.wait())
    try:
        await server.is_up.wait()
        on_ready(url_of(listener))
        await asyncio.wait({serving, stopping, following}, return_when=asyncio.FIRST_COMPLETED)
        endpoints.admission.is_draining = True
        server.should_exit = True
        forced = asyncio.ensure_future(stop.forced.wait())
        await asyncio.wait({serving, forced}, return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = True
        forced.cancel()
        await serving
        if following.done():  # it follows for ever, so it has failed
            following.result()
    finally:
        for task in (stopping, serving, following):
            task.cancel()
        await asyncio.gather(serving, stopping, following, return_exceptions=True)
        await _end_requests(server, endpoints)
        await endpoints.close()
        listener.close()


async def _never() -> None:
    await asyncio.get_running_loop().create_future()


async def _end_requests(server: uvicorn.Server, endpoints: Endpoints) -> None:
    """Requests that outlived the drain are cancelled; their connections carry the word to the workers."""
    tasks = set(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLEANUP_S)
    for connection in tuple(server.server_state.connections):  # whose clients do not read what they were told
        connection.transport.abort()
    left = [task for task in tasks if not task.done()]
    if left:
        await asyncio.wait(left, timeout=1.0)
    if endpoints.admission.num_sequences:
        log.warning("%d sequences did not end within %g s", endpoints.admission.num_sequences, CLEANUP_S)


def _uvicorn_config(config: RouterConfig, endpoints: Endpoints) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(endpoints),
        http=protocol_class(
            header_timeout_s=config.header_timeout_s,
            write_timeout_s=config.write_timeout_s,
            max_connections=config.max_connections,
            count_refused=partial(endpoints.metrics.count_response, NO_HANDLER),
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=round(config.keep_alive_s),
        timeout_graceful_shutdown=DRAIN_SHARE * config.drain_timeout_s,  # type: ignore[arg-type]  # given to wait_for
    )
