"""Between ASGI and our types: bodies in with a limit, JSON and errors out, work raced against a client that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import BodyTooLarge, Cancelled, DeadlineExceeded, InvalidRequest, Overloaded, TandemError
from cluster.router.responses import error_envelope
from cluster.router.sse import error_event

JSON_TYPE = (b"content-type", b"application/json")
EVENT_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collects the stream would undo it
)
MAX_DISCARDED_BYTES = 64 << 20  # of a body over the limit: so much is read on, then the connection is closed
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")
_encode = msgspec.json.Encoder().encode


def header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def client_request_id(scope: Scope) -> str | None:
    """The client's X-Request-Id, to echo and to log. None when it is absent or not fit for a log line."""
    value = header(scope, b"x-request-id")
    return value.decode() if value is not None and _REQUEST_ID.fullmatch(value) else None


def check_not_forged(scope: Scope) -> None:
    """Any page may make a browser post a form or plain text to a server on this machine; for JSON the browser asks
    the server first. Raises `InvalidRequest` for what comes from a page and is not declared as JSON."""
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if header(scope, b"origin") is not None and kind != b"application/json":
        raise InvalidRequest("a page of a browser must send its request with content-type: application/json")


class Reply:
    """The one answer to one HTTP request. Knows how far it has got, so that an error can still be said."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self._request_id_header = (b"x-request-id", request_id.encode())
        self._clock = asyncio.get_running_loop().time
        self.writing_since: float | None = None  # None while no write waits for the client to read
        self.closes_connection = False  # set while there is a body that has not been read
        self.has_begun_to_read = False  # that body
        self.is_streaming = False
        self.is_complete = False
        self.status = 0  # 0: nothing has been said yet

    async def json(self, body: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        await self.whole(_encode(body), status, (JSON_TYPE, *headers))

    async def whole(self, body: bytes, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, (*headers, length))
        self.is_complete = True
        await self._write(body, more=False)

    async def event(self, data: bytes) -> None:
        """One write per event; the first one sends the headers, so a failure before it has its own status."""
        if not self.is_streaming:
            self.is_streaming = True
            await self._start(200, EVENT_STREAM_HEADERS)
        await self._write(data, more=True)

    async def end_events(self, data: bytes) -> None:
        await self.event(data)
        self.is_complete = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def error(self, error: TandemError) -> None:
        status, envelope = error_envelope(error)
        if self.is_complete:
            return
        if self.is_streaming:
            await self.end_events(error_event(envelope))
            return
        headers: tuple[tuple[bytes, bytes], ...] = ()
        if status == 503:
            retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
            headers = ((b"retry-after", str(max(1, round(retry_after_s))).encode()),)
        await self.json(envelope, status, headers)

    async def _start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.status = status
        closing = ((b"connection", b"close"),) if self.closes_connection else ()
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*headers, self._request_id_header, *closing]}
        )

    async def _write(self, data: bytes, *, more: bool) -> None:
        """Waits while the client's socket is full; `race_disconnect` watches how long."""
        self.writing_since = self._clock()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.writing_since = None


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """Raises `BodyTooLarge` while reading, `InvalidRequest` for a body that does not come, `Cancelled`."""
    declared = header(scope, b"content-length")
    num_declared = int(declared) if declared is not None and declared.isdigit() else 0
    if num_declared > max_bytes and header(scope, b"expect") is not None:
        raise _too_large(num_declared, max_bytes)  # the client waits for our word before it sends
    body = bytearray()
    num_received, num_bytes = 0, num_declared
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client went away while sending its request")
                piece = message.get("body", b"")
                num_received += len(piece)
                num_bytes = max(num_received, num_declared)
                if num_bytes <= max_bytes:
                    body += piece
                elif num_received > max_bytes + MAX_DISCARDED_BYTES:
                    break
                else:
                    body.clear()  # read on, or the client would see a reset instead of our answer
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        if num_bytes <= max_bytes:
            raise InvalidRequest(f"the request body did not arrive within {timeout_s:g} s") from error
    if num_bytes > max_bytes:
        raise _too_large(num_bytes, max_bytes)
    return bytes(body)


async def discard_body(scope: Scope, receive: Receive, *, timeout_s: float) -> None:
    """Of a request that is refused unread: a client that still sends would see a reset instead of our answer. One
    that waits for our word (`Expect`) does not send."""
    if not has_body(scope) or header(scope, b"expect") is not None:
        return
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while num_bytes <= MAX_DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _too_large(num_bytes: int, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body has at least {num_bytes} bytes, at most {max_bytes} are accepted")


async def race_disconnect(
    receive: Receive, reply: Reply, work: Coroutine[Any, Any, None], *, timeout_s: float, write_timeout_s: float
) -> None:
    """Run `work` until it ends, the client leaves or stops reading (`Cancelled`) or the time is up
    (`DeadlineExceeded`). `work` is over when this returns or raises: its `finally` blocks have run."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + timeout_s
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        while not working.done():
            if leaving.done():
                raise Cancelled("the client went away")
            if reply.writing_since is not None and clock() - reply.writing_since > write_timeout_s:
                raise Cancelled(f"the client has read nothing for {write_timeout_s:g} s")
            if clock() >= give_up_at:
                raise DeadlineExceeded(f"the request took longer than {timeout_s:g} s")
            wait_s = min(give_up_at - clock(), write_timeout_s / 4)
            await asyncio.wait({working, leaving}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()


def has_body(scope: Scope) -> bool:
    length = header(scope, b"content-length")
    return length not in (None, b"0") or header(scope, b"transfer-encoding") is not None
