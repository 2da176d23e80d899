"""Log lines are one line each, whatever is in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cluster.logs import LogFormat, configure_logging, log_event


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def lines_of(log_format: LogFormat) -> list[str]:
    stream = io.StringIO()
    configure_logging("info", log_format, stream=stream)
    logger = logging.getLogger("test")
    log_event(logger, logging.INFO, "sequence ended", request="r-1", tokens=3, seconds=0.1234567890, stop=None)
    log_event(logger, logging.DEBUG, "hidden")
    logger.warning("plain %s", "words")
    log_event(logger, logging.INFO, "odd", text='a "b"=\nc')
    return stream.getvalue().splitlines()


def test_json_lines() -> None:
    first, second, third = map(json.loads, lines_of("json"))
    assert first["time"].endswith("Z")
    del first["time"]
    assert first == {
        "level": "info",
        "logger": "test",
        "event": "sequence ended",
        "request": "r-1",
        "tokens": 3,
        "seconds": 0.123456789,
    }
    assert (second["level"], second["event"]) == ("warning", "plain words")
    assert third["text"] == 'a "b"=\nc'


def test_text_lines() -> None:
    first, second, third = lines_of("text")
    assert first.endswith("INFO test: sequence ended request=r-1 tokens=3 seconds=0.123457")
    assert second.endswith("WARNING test: plain words")
    assert third.endswith(r'odd text="a \"b\"=\nc"')
