"""The router as a server inside a running event loop: bind, serve, drain.

uvicorn speaks HTTP; what it leaves unbounded is bounded here: the number of connections, the time and
the size of a request's head.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from asyncio.events import TimerHandle
from collections.abc import Callable, Coroutine, Iterator, Sequence

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.addresses import join_address
from cluster.errors import StartupError
from cluster.router.config import RouterConfig
from cluster.router.endpoints import Endpoints
from cluster.router.http import make_app
from cluster.router.pool import WorkerPool
from cluster.router.responses import ErrorBody, ErrorEnvelope
from cluster.router.text import Codec
from cluster.rpc.base import WorkerConnection

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
BACKLOG = 2048
DRAIN_SHARE = 0.8  # of the drain timeout for requests to finish; the rest is for telling those that did not
CLEANUP_S = 5.0  # for cancelled requests to tell the workers


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A subclass made by `_protocol_for` carries the limits."""

    header_timeout_s: float
    max_connections: int

    _head_timer: TimerHandle | None = None
    _is_in_head = True
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            log.warning("over %d connections, one more was closed", self.max_connections)
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["tandem.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if was_in_head and self._is_in_head:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head of the request has more than {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = msgspec.json.encode(ErrorEnvelope(ErrorBody(message, "invalid_request_error", None, "malformed_http")))
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _begin_head(self) -> None:
        self._end_head()
        self._is_in_head = True
        self._head_timer = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _end_head(self) -> None:
        self._is_in_head = False
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


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


class Stop:
    """Asks a running router to end. `request` once: drain; again: at once."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()

    def request(self) -> None:
        if self.requested.is_set():
            self.forced.set()
        self.requested.set()


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before anything slow is started. Raises `StartupError` with the way out."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # by which asyncio knows to disable Nagle
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} on {host} is already taken; stop the process that uses it or choose another port "
                "(router.port, 0 chooses a free one)"
            ) from error
        raise StartupError(f"cannot listen on {join_address(host, port)}: {error.strerror}") from error
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
    if endpoints.admission.num_sequences:
        log.warning("%d sequences did not end within %g s", endpoints.admission.num_sequences, CLEANUP_S)


def _uvicorn_config(config: RouterConfig, endpoints: Endpoints) -> uvicorn.Config:
    limits = {"header_timeout_s": config.header_timeout_s, "max_connections": config.max_connections}
    return uvicorn.Config(
        make_app(endpoints),
        http=type("_Protocol", (BoundedHttpProtocol,), limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=round(config.keep_alive_s),
        timeout_graceful_shutdown=int(DRAIN_SHARE * config.drain_timeout_s),
    )
