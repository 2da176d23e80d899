"""The result of a run as JSON lines: the options, one line per request as it ends, the summary."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from cluster.bench.measure import RequestRecord, Summary
from cluster.errors import ConfigError

FORMAT_VERSION = 1


class RunLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="run"):
    version: int
    url: str
    model: str
    options: dict[str, str | int | float | bool | None]
    started: str  # UTC, ISO 8601


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="request"):
    request: RequestRecord


class SummaryLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="summary"):
    summary: Summary
    is_complete: bool  # False: the run was interrupted


_Line = RunLine | RequestLine | SummaryLine
_encode = msgspec.json.Encoder().encode


class ResultFile:
    """Written while the run goes on, so that it holds what was measured however the run ends."""

    def __init__(self, path: Path, run: RunLine) -> None:
        """Raises `ConfigError` if it cannot be written."""
        try:
            self._file: IO[bytes] = path.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self._write(run)

    def add(self, record: RequestRecord, gaps: array[float]) -> None:
        self._write(RequestLine(request=record))

    def end(self, summary: Summary, *, is_complete: bool) -> None:
        self._write(SummaryLine(summary=summary, is_complete=is_complete))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _write(self, line: _Line) -> None:
        self._file.write(_encode(line) + b"\n")


def read_result(path: Path) -> tuple[RunLine, SummaryLine]:
    """What a comparison needs. Raises `ConfigError` naming the file."""
    run: RunLine | None = None
    summary: SummaryLine | None = None
    try:
        with path.open("rb") as file:
            for line in file:
                match msgspec.json.decode(line, type=_Line):
                    case RunLine() as run if run.version != FORMAT_VERSION:
                        raise ConfigError(f"{path} has format {run.version}, this version reads {FORMAT_VERSION}")
                    case SummaryLine() as summary:
                        pass
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no result of `cluster bench --output`: {error}") from error
    if run is None or summary is None:
        raise ConfigError(f"{path} is no complete result of `cluster bench --output`")
    return run, summary
