"""What tells a rank to stop: signals, which the outer launcher sends to all ranks at once, and the launcher's death.

The order of stopping is ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.errors import StartupError
from cluster.launch.stop_signals import STOP_SIGNALS, handled
from cluster.stop import Stop

# mpirun hands SIGUSR1 on to all ranks and does nothing else, Slurm can send it before a job's time is up.
RANK_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
SAME_SIGNAL_S = 0.5  # what a signal did to another rank may be learned before the signal itself
PARENT_LOOK_S = 1.0

_T = TypeVar("_T")


class StopSignals:
    """`wanted` at the first signal, or when the parent is gone; `forced` at one that is no echo of it (`Stop`)."""

    def __init__(self) -> None:
        self._stop = Stop()
        self.wanted, self.forced = self._stop.requested, self._stop.forced
        self.name = ""
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

    async def until_stopped(self, work: Coroutine[None, None, _T], otherwise: _T) -> _T:
        """The result of `work`, which raises nothing; at a signal it is cancelled, and the result is `otherwise`."""
        try:
            return await self.unless_stopped(work, "")
        except StartupError:
            return otherwise

    def _on_signal(self, number: signal.Signals) -> None:
        self._request(number.name)

    def _request(self, name: str) -> None:
        self.name = self.name or name
        self._stop.request()

    async def _watch_parent(self) -> None:
        """A launcher that was killed cannot end its ranks; they would outlive their job."""
        while os.getppid() == self._parent:  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(PARENT_LOOK_S)
        if not self.wanted.is_set():
            self._request("the death of the process that started this rank")
