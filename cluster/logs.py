"""Log lines that a program can read: one per event, with the request it is about.

    text  2026-11-24 10:00:00,123 INFO cluster.router.generation: sequence ended request=cmpl-1f-0 tokens=16
    json  {"time":"2026-11-24T10:00:00.123Z","level":"info","logger":"...","event":"sequence ended","request":...}

No prompt and no generated text is ever logged. A client's X-Request-Id is logged, nothing is keyed by it.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

import msgspec

Field = str | int | float | None
LogFormat = Literal["text", "json"]


def log_event(logger: logging.Logger, level: int, event: str, **fields: Field) -> None:
    """One line; fields that are None are left out."""
    if logger.isEnabledFor(level):
        logger.log(level, _Event(event, {name: value for name, value in fields.items() if value is not None}))


class _Event:
    """A log record's message: text to whoever asks for text."""

    def __init__(self, name: str, fields: dict[str, Field]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return self.name + "".join(f" {name}={_shown(value)}" for name, value in self.fields.items())


def configure_logging(level: str, log_format: LogFormat, *, stream: TextIO | None = None) -> None:
    """Of this process, once at its start. To stderr: stdout belongs to process events."""
    handler = logging.StreamHandler(stream or sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _shown(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    is_plain = text.isprintable() and not any(letter in text for letter in ' "=')
    return text if is_plain and text else msgspec.json.encode(text).decode()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event: object = record.msg
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Field] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event.name if isinstance(event, _Event) else record.getMessage(),
        }
        if isinstance(event, _Event):
            line |= event.fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
