"""Stop signals of a rank. The outer launcher sends them to all ranks at once, the order of stopping is ours."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.errors import StartupError
from cluster.launch.local import STOP_SIGNALS

# mpirun hands SIGUSR1 on to all ranks and does nothing else, Slurm can send it before a job's time is up.
RANK_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
ECHO_S = 2.0  # a terminal and a launcher may both send one for the same Ctrl-C

_T = TypeVar("_T")


class StopSignals:
    """`wanted` at the first signal; `forced` at one that comes more than `ECHO_S` later."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.forced = asyncio.Event()
        self.name = ""
        self._first_at = 0.0

    @contextmanager
    def handled(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in RANK_STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in RANK_STOP_SIGNALS:
                loop.remove_signal_handler(number)

    async def unless_stopped(self, work: Coroutine[None, None, _T], doing: str) -> _T:
        """The result of `work`, which is cancelled at a signal. Raises `StartupError` then."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.wanted.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise StartupError(f"{self.name} while {doing}")
        finally:
            for each in (task, stopped):
                each.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    def _on_signal(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.wanted.is_set():
            self.name, self._first_at = number.name, now
            self.wanted.set()
        elif now - self._first_at > ECHO_S:
            self.forced.set()
