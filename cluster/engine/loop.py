"""The thread that owns an engine, its blocks and its transport.

    any thread -- send(command) --> inbox --> driver.handle     } one thread, so nothing in here or in the
    event loop <-- publish(news) --------- driver.turn          } engine needs a lock

A turn is at most one engine step; what it brought is published at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Command = TypeVar("Command")
News = TypeVar("News")
_CommandIn = TypeVar("_CommandIn", contravariant=True)
_NewsOut = TypeVar("_NewsOut", covariant=True)


class Driver(Protocol[_CommandIn, _NewsOut]):
    """What a worker does on its engine thread. No method may block."""

    def handle(self, command: _CommandIn, now: float) -> None: ...

    def turn(self, now: float) -> _NewsOut | None:
        """Poll what is under way and run at most one engine step."""
        ...

    def idle_s(self, now: float) -> float:
        """How long the thread may wait for a command before the next turn; 0: there is work."""
        ...

    def close(self) -> None:
        """Called once, at the end, on the same thread."""
        ...


class EngineThread(Generic[Command, News]):
    """Runs a driver until `stop`. A driver that raises ends the thread: its traceback goes to stderr and
    `on_exit` tells the owner, who must not go on serving."""

    def __init__(
        self, driver: Driver[Command, News], publish: Callable[[News], None], on_exit: Callable[[bool], None]
    ) -> None:
        self._driver = driver
        self._publish = publish
        self._on_exit = on_exit  # called with True if it was asked to stop
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._turn_began_at: float | None = None

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """From any thread. Commands sent after `stop` are dropped."""
        self._inbox.put(command)

    def turn_s(self) -> float:
        """For how long the turn under way has lasted; 0: none is. From any thread."""
        began_at = self._turn_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def stop(self, timeout_s: float) -> bool:
        """End after the current turn; True if the thread is gone."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        was_asked = has_closed = False
        try:
            while self._handle_commands():
                now = self._turn_began_at = time.monotonic()
                news = self._driver.turn(now)
                self._turn_began_at = None
                if news is not None:
                    self._publish(news)
            was_asked = True
        finally:
            try:
                self._driver.close()
                has_closed = True
            finally:  # the owner must know, whatever the driver's end brings
                self._on_exit(was_asked and has_closed)

    def _handle_commands(self) -> bool:
        """All that have arrived; waits for the first if there is nothing else to do. False: stop."""
        now = time.monotonic()
        wait_s = self._driver.idle_s(now)
        try:
            command = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            while command is not None:
                self._driver.handle(command, time.monotonic())
                command = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False
