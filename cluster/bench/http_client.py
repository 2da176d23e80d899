"""A small HTTP/1.1 client whose clock stops when bytes arrive.

Bytes go from the socket through a C parser straight into the caller's sink, without a task switch in
between, so that a chunk's time is that of its arrival and the client costs a few microseconds per chunk.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

from cluster.errors import ConfigError

Sink = Callable[[bytes, float], None]  # a part of the body, and when it arrived (time.perf_counter)
MAX_ERROR_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 10.0


class RequestFailed(Exception):
    """No usable answer. `kind` is what errors are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.is_usable = True
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(RequestFailed("connection_lost", "the server closed the connection before the answer was complete"))

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(RequestFailed("malformed_http", str(error)))
            self.close()

    async def exchange(self, message: bytes, sink: Sink) -> int:
        """Send and wait for the end of the answer. The body of a 200 goes to `sink`; other statuses raise."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._status = 0
        self._error_body = bytearray()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            status = await self._answer
        except asyncio.CancelledError:
            self.close()  # what is left of the answer must not be taken for the next one's
            raise
        if status != 200:
            text = self._error_body.decode(errors="replace")
            raise RequestFailed(f"http_{status}", f"HTTP {status}: {text[:500]}")
        return status

    def close(self) -> None:
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the parser

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._sink(body, self._now)
        elif len(self._error_body) < MAX_ERROR_BYTES:
            self._error_body += body

    def on_message_complete(self) -> None:
        self.is_usable = self.is_usable and self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._status)

    def _fail(self, error: RequestFailed) -> None:
        self.is_usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class HttpClient:
    """Keeps connections to one server; as many as requests are in flight. Close it at the end."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """Raises `ConfigError` for a URL that is none."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"{url} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{url} is no URL, such as http://127.0.0.1:8000")
        self._host = host
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\naccept: */*\r\n{authorization}"
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def call(self, method: str, path: str, body: bytes | None, sink: Sink, *, timeout_s: float) -> None:
        """One request; the body of the answer goes to `sink`. Raises `RequestFailed`."""
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connection()
                try:
                    await connection.exchange(self._message(method, path, body), sink)
                finally:
                    self._give_back(connection)
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no complete answer within {timeout_s:g} s") from error

    async def fetch(self, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 60.0) -> bytes:
        """A whole body."""
        parts: list[bytes] = []
        await self.call(method, path, body, lambda part, now: parts.append(part), timeout_s=timeout_s)
        return b"".join(parts)

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._free.clear()

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        entity = "" if body is None else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}{entity}\r\n".encode() + (body or b"")

    async def _connection(self) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if connection.is_usable:
                return connection
            self._all.discard(connection)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise RequestFailed("connect", f"cannot connect to {self._host}:{self._port}: {reason}") from error
        self._all.add(connection)
        return connection

    def _give_back(self, connection: _Connection) -> None:
        if connection.is_usable:
            self._free.append(connection)
        else:
            connection.close()
            self._all.discard(connection)
