"""One HTTP connection: what uvicorn leaves unbounded or undecided is bounded and decided here.

- The head of a request: its time and its size.
- One request at a time. What a client sends before it has its answer is not read as a request: the answer is given
  in full, then the connection is closed, and the client may ask again (RFC 9112, 9.3.1). Reading goes on
  meanwhile, since a client that leaves is noticed by reading.
- `Upgrade` is ignored, as a server may (RFC 9110, 7.8): the request is answered as HTTP/1.1, body included.
"""

from __future__ import annotations

import logging
import re
from asyncio import Transport
from asyncio.events import TimerHandle
from collections.abc import Callable
from typing import cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cluster.router.responses import ErrorBody, ErrorEnvelope

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
_HEAD_END = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)


class BoundedHttpProtocol(HttpToolsProtocol):
    """A subclass made by `protocol_class` carries the limits."""

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int
    count_refused: Callable[[int], None]  # a status that no endpoint has told

    _head_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None
    _num_unsent = 0  # bytes that waited for the client when it was looked at last
    _num_head_bytes = 0
    _last_bytes = b""  # of the head so far: its end may be cut in two
    _held = b""  # the line of the head that is not whole yet
    _num_bytes_between = 0  # fed to the parser in a body, without any of the body: chunk sizes, trailers
    _is_in_head = True
    _is_deaf = False  # what comes now is not read: the connection ends with the answer under way

    # ---- asyncio's calls

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not self._make_room():
            log.warning("over %d connections, one more was closed", self.max_connections)
            transport.abort()
            return
        self._begin_head()

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for another request of its client, which may be none. Else those
        who come to see whether this process lives would be turned away by clients that have their answers."""
        waiting = {
            each: each.timeout_keep_alive_task.when()
            for each in self.connections
            if isinstance(each, BoundedHttpProtocol)
            and each.timeout_keep_alive_task is not None
            and not each.transport.is_closing()
        }
        if waiting:
            min(waiting, key=waiting.__getitem__).transport.close()
        return bool(waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._stop_watching_writes()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._awaits_answer:
            if data.strip(b"\r\n"):  # empty lines after a body are old clients' way
                self._close_after_answer()
            return
        if self._expects_head:
            if self._head_timer is None:
                self._begin_head()
            if not self._num_head_bytes:
                data = data.lstrip(b"\r\n")
            end = (self._last_bytes + data).find(_HEAD_END)
            num_bytes = len(data) if end < 0 else end + len(_HEAD_END) - len(self._last_bytes)
            self._num_head_bytes += num_bytes
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the head of the request has more than {MAX_HEAD_BYTES} bytes")
                return
            self._last_bytes = (self._last_bytes + data)[1 - len(_HEAD_END) :]
            data = self._without_upgrade(data, num_bytes, is_whole=end >= 0)
        else:
            self._num_bytes_between += len(data)
        if data:
            super().data_received(data)
        if self._num_bytes_between > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"more than {MAX_HEAD_BYTES} bytes between the chunks of a body or behind it")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        self._stop_watching_writes()
        super().resume_writing()

    # ---- the parser's calls

    def on_message_begin(self) -> None:
        if self._running is not None:
            self._close_after_answer()
            return
        super().on_message_begin()
        self._stop_watching_writes()
        self.scope["tandem.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self._begin_head()

    def on_url(self, url: bytes) -> None:
        if not self._is_deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_deaf and self._is_in_head:  # else it is a trailer, which nobody asked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._end_head()
        if self.parser.should_upgrade():  # CONNECT: what follows would not be read as a body
            self._refuse(400, "this method or this upgrade is not supported")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_deaf:
            self._num_bytes_between = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._awaits_answer:
            self._close_after_answer()
        else:
            self._refuse(400, msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_writes()

    # ----

    @property
    def _running(self) -> RequestResponseCycle | None:
        """A request whose head has come and whose answer is not complete."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return None if cycle is None or cycle.response_complete else cycle

    @property
    def _awaits_answer(self) -> bool:
        """The client has sent a whole request, and waits."""
        return self._running is not None and not self._running.more_body

    @property
    def _expects_head(self) -> bool:
        """What comes now belongs to a head, or begins one."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return self._is_in_head or cycle is None or (cycle.response_complete and not cycle.more_body)

    def _close_after_answer(self) -> None:
        self._is_deaf = True
        self.cycle.keep_alive = False

    def _refuse(self, status: int, message: str) -> None:
        """Also in the middle of a body: nothing can follow what was not understood."""
        self._is_deaf = True
        if self._running is not None and self._running.response_started:
            self.transport.close()
            return
        type(self).count_refused(status)
        body = msgspec.json.encode(ErrorEnvelope(ErrorBody(message, "invalid_request_error", None, "malformed_http")))
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._watch_writes()

    def _without_upgrade(self, data: bytes, num_head_bytes: int, *, is_whole: bool) -> bytes:
        """What may be parsed now. Lines of a head that has not come to its end are held until they are whole."""
        head = self._held + data[:num_head_bytes]
        self._held = b""
        if not is_whole:
            cut = head.rstrip(b"\r\n").rfind(b"\r\n")
            if cut >= 0 or b"\r" in head:
                self._held, head = head[max(cut, 0) :], head[: max(cut, 0)]
        return _UPGRADE.sub(b"", head) + data[num_head_bytes:]

    def _watch_writes(self) -> None:
        """While an answer waits for the client. A stream is watched by `race_disconnect`, too; nobody else watches what
        is left of an answer that is complete."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes and self._write_timer is None:
            self._num_unsent = num_bytes
            self._write_timer = self.loop.call_later(self.write_timeout_s, self._look_at_writes)

    def _look_at_writes(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() >= self._num_unsent:
            log.info("a client has read nothing of its answer for %g s", self.write_timeout_s)
            self.transport.abort()
        else:
            self._watch_writes()

    def _stop_watching_writes(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _begin_head(self) -> None:
        self._stop_timer()
        self._is_in_head = True
        self._head_timer = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _end_head(self) -> None:
        self._stop_timer()
        self._is_in_head = False
        self._num_head_bytes = self._num_bytes_between = 0
        self._last_bytes = self._held = b""

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def protocol_class(
    *, header_timeout_s: float, write_timeout_s: float, max_connections: int, count_refused: Callable[[int], None]
) -> type[BoundedHttpProtocol]:
    """What uvicorn makes a connection of."""
    limits = {
        "header_timeout_s": header_timeout_s,
        "write_timeout_s": write_timeout_s,
        "max_connections": max_connections,
        "count_refused": staticmethod(count_refused),
    }
    return type("_Protocol", (BoundedHttpProtocol,), limits)
