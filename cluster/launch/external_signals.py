"""What tells a rank to stop: signals, which the outer launcher sends to all ranks at once, and the launcher's death.

The order of stopping is ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.errors import StartupError
from cluster.launch.stop_signals import STOP_SIGNALS, handled

# mpirun hands SIGUSR1 on to all ranks and does nothing else, Slurm can send it before a job's time is up.
RANK_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
ECHO_S = 2.0  # a terminal and a launcher may both send one for the same Ctrl-C
SAME_SIGNAL_S = 0.5  # what a signal did to another rank may be learned before the signal itself
PARENT_LOOK_S = 1.0

_T = TypeVar("_T")


class StopSignals:
    """`wanted` at the first signal, or when the parent is gone; `forced` at a signal more than `ECHO_S` later."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.forced = asyncio.Event()
        self.name = ""
        self._first_at = 0.0
        self._parent = os.getppid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        with handled(RANK_STOP_SIGNALS, self._on_signal):
            watching = asyncio.ensure_future(self._watch_parent())
            try:
                yield
            finally:
                watching.cancel()

    async def unless_stopped(self, work: Coroutine[None, None, _T], doing: str) -> _T:
        """The result of `work`, which is cancelled at a signal. Raises `StartupError` then, also if `work` failed
        just before: with the signal, all ranks leave."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.wanted.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is None:
                return task.result()
            if task.done():
                await asyncio.wait({stopped}, timeout=SAME_SIGNAL_S)
                if not self.wanted.is_set():
                    return task.result()
            raise StartupError(f"{self.name} while {doing}")
        finally:
            for each in (task, stopped):
                each.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.wanted.is_set():
            self._want(number.name)
        elif time.monotonic() - self._first_at > ECHO_S:
            self.forced.set()

    def _want(self, name: str) -> None:
        self.name, self._first_at = name, time.monotonic()
        self.wanted.set()

    async def _watch_parent(self) -> None:
        """A launcher that was killed cannot end its ranks; they would outlive their job."""
        while os.getppid() == self._parent:  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(PARENT_LOOK_S)
        if not self.wanted.is_set():
            self._want("the death of the process that started this rank")
