"""Being told to stop: once means drain, again means at once, and an echo means nothing."""

from __future__ import annotations

import asyncio
import signal
import time

ECHO_S = 2.0  # who stops a whole group of processes tells each of them, and so does their launcher, or a terminal


class Stop:
    """`requested` at the first request; `forced` at one more than `ECHO_S` later."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self._first_at = 0.0

    @classmethod
    def at_signals(cls) -> Stop:
        """Requested by SIGINT and SIGTERM from now on; before, they simply end the process. On the loop of the main
        thread."""
        stop = cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.request)
        return stop

    def request(self) -> bool:
        """False: it was an echo, and changes nothing."""
        if not self.requested.is_set():
            self._first_at = time.monotonic()
            self.requested.set()
            return True
        if time.monotonic() > self._first_at + ECHO_S:
            self.forced.set()
            return True
        return False

    def force(self) -> None:
        self.requested.set()
        self.forced.set()
