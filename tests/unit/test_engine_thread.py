"""The engine's thread: its owner hears of its end, however it ends."""

from __future__ import annotations

import threading

import pytest

from cluster.engine.loop import EngineThread

TIMEOUT_S = 10.0


class Driver:
    """Fails where it is told to."""

    def __init__(self, *failing: str) -> None:
        self._failing = failing
        self.has_closed = False

    def handle(self, command: str, now: float) -> None:
        self._fail("handle")

    def turn(self, now: float) -> None:
        self._fail("turn")

    def idle_s(self, now: float) -> float:
        return 0.01

    def close(self) -> None:
        self.has_closed = True
        self._fail("close")

    def _fail(self, where: str) -> None:
        if where in self._failing:
            raise RuntimeError(where)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("failing", "was_asked"),
    [
        ((), True),
        (("turn",), False),
        (("handle",), False),
        (("close",), False),  # what it held may be held still
        (("turn", "close"), False),
    ],
)
def test_the_owner_is_told_once(failing: tuple[str, ...], was_asked: bool) -> None:
    told: list[bool] = []
    is_over = threading.Event()

    def on_exit(asked: bool) -> None:
        told.append(asked)
        is_over.set()

    driver = Driver(*failing)
    thread: EngineThread[str, None] = EngineThread(driver, lambda news: None, on_exit)
    thread.start()
    thread.send("command")
    if failing in ((), ("close",)):
        thread.stop(TIMEOUT_S)
    assert is_over.wait(TIMEOUT_S)
    assert thread.stop(TIMEOUT_S), "the thread is gone"
    assert told == [was_asked]
    assert driver.has_closed
