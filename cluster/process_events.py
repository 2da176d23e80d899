"""What a process started by `cluster launch` tells its launcher: one JSON line per event on stdout.

    {"event":"progress","what":"loading weights","done":3,"total":272}
    {"event":"ready","address":"127.0.0.1:41231","detail":"1,234 KV blocks of 32 tokens"}
    {"event":"failed","code":"model_error","message":"missing tensor blk.3.attn_q.weight"}

stdout carries nothing else; logs and tracebacks go to stderr, whose tail the launcher shows when the
process dies. A line that is no event is shown as a log line and breaks nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TextIO

import msgspec

from cluster.errors import TandemError


class Progress(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """`done` of `total` of the step named `what`; `total` 0 means that the end is not known."""

    what: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, frozen=True, tag_field="event", tag="ready"):
    """The process serves at `address` ("host:port", with the port it really bound)."""

    address: str
    detail: str = ""


class Failed(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """The process gives up and will exit non-zero. `code` names a class of errors.py."""

    code: str
    message: str


ProcessEvent = Progress | Ready | Failed
ShowProgress = Callable[[str, int, int], None]  # what, done, total: the fields of a `Progress`

_decoder: msgspec.json.Decoder[ProcessEvent] = msgspec.json.Decoder(ProcessEvent)


def emit(event: ProcessEvent, stream: TextIO | None = None) -> None:
    """Write one event as one line and flush it. A launcher that is gone is not an error."""
    out = stream or sys.stdout
    try:
        out.write(msgspec.json.encode(event).decode() + "\n")
        out.flush()
    except BrokenPipeError:
        return


def emit_ready(address: str, detail: str = "") -> None:
    """All is loaded, and what there is now stays to the end: collections of garbage need not look at it again. A full
    one would stop every thread of a worker for more than 0.1 s, which is many decode steps."""
    gc.collect()
    gc.freeze()
    emit(Ready(address=address, detail=detail))


def emit_failure(error: TandemError, stream: TextIO | None = None) -> None:
    emit(Failed(code=error.code, message=error.message), stream)


def parse(line: str | bytes) -> ProcessEvent | None:
    """The event of one stdout line; None for a line that is none."""
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:  # also ValidationError: a JSON line of another shape
        return None
