"""One stop that is told twice is one stop."""

from __future__ import annotations

import time

import pytest

from cluster.stop import ECHO_S, Stop


def test_an_echo_is_not_a_second_request(monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = iter([100.0, 100.0, 100.0 + ECHO_S / 2, 100.0 + ECHO_S, 100.1 + ECHO_S])
    monkeypatch.setattr(time, "monotonic", lambda: next(times_s))
    stop = Stop()
    assert not stop.requested.is_set()
    for _ in range(4):
        stop.request()
        assert stop.requested.is_set()
        assert not stop.forced.is_set()
    stop.request()
    assert stop.forced.is_set()


def test_who_forces_also_requests() -> None:
    stop = Stop()
    stop.force()
    assert stop.requested.is_set()
    assert stop.forced.is_set()
