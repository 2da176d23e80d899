"""Runs the processes of a topology from this machine: start, watch, restart, drain. Where they run is their own
business (`Launchable`).

start all --one dies--> stop the others, StartupError
    | all ready
    v
follow ---one dies---> report, restart after a growing pause ---too often---> drain, StartupError
    | Ctrl-C, SIGTERM
    v
drain in stop order: router (its streams end), then workers; a signal two seconds later kills at once

While it follows, processes can be added and drained one by one (`add`, `drain`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Protocol

from cluster.config import LaunchSettings
from cluster.errors import StartupError
from cluster.launch.process import Launchable, ProcessListener, RunningProcess
from cluster.launch.stop_signals import STOP_SIGNALS, handled
from cluster.process_events import ProcessEvent, Ready
from cluster.stop import ECHO_S, Stop

FIRST_RESTART_PAUSE_S = 1.0
LONGEST_RESTART_PAUSE_S = 30.0
RESTART_WINDOW_S = 300.0
ABORTED_START_GRACE_S = 5.0  # for the healthy processes when another one failed to start
DRAIN_MARGIN_S = 10.0  # beyond the drain time, which the processes keep themselves
KILL_GRACE_S = 10.0  # until a killed process is gone
PROBE_TIMEOUT_S = 60.0


class LaunchView(ProcessListener, Protocol):
    """What the user sees. Called on the event loop; must not block."""

    def on_start(self, name: str) -> None: ...

    def on_death(self, name: str, how: str, last_words: Sequence[str], restart_in_s: float) -> None: ...

    def on_serving(self) -> None: ...

    def on_stop(self, reason: str) -> None: ...


class LocalLauncher:
    """One launch. `probe` returns once the deployment answers requests (called when all are ready).

    Without `handles_signals` the caller decides when to `stop` and when to `kill`.
    """

    def __init__(
        self,
        specs: Sequence[Launchable],
        settings: LaunchSettings,
        view: LaunchView,
        probe: Callable[[], Awaitable[None]],
        *,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
        handles_signals: bool = True,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._settings = settings
        self._view = view
        self._probe = probe
        self._probe_timeout_s = probe_timeout_s
        self._handles_signals = handles_signals
        self._running: dict[str, RunningProcess] = {}
        self._was_ready = {spec.name: asyncio.Event() for spec in specs}
        self._supervisors: dict[str, asyncio.Task[str]] = {}
        self._leaving: set[str] = set()
        self._group: asyncio.TaskGroup | None = None
        self.is_serving = False
        self.killed: list[str] = []  # at the end of a launch that served: requests may have been cut
        self._failure: StartupError | None = None
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._told = Stop()  # by signals

    async def run(self) -> None:
        """Returns after a clean stop. Raises `StartupError` when a process failed for good; nothing runs
        any more then."""
        with handled(STOP_SIGNALS if self._handles_signals else (), self._on_signal):
            async with asyncio.TaskGroup() as group:
                self._group = group
                for spec in self._specs.values():
                    self._supervisors[spec.name] = group.create_task(self._supervise(spec))
                follower = group.create_task(self._follow())
                await self._stopping.wait()
                follower.cancel()
                await self._stop_all()
                await asyncio.wait(self._supervisors.values(), timeout=KILL_GRACE_S)
                for supervisor in self._supervisors.values():
                    supervisor.cancel()
        if self._failure is not None:
            raise self._failure

    def stop(self, reason: str) -> None:
        """Begin to drain; called again, kill."""
        if self._stopping.is_set():
            self.kill()
            return
        self._view.on_stop(reason)
        self._stopping.set()

    def kill(self) -> None:
        """End everything without waiting for requests."""
        self._view.on_stop("stopping at once")
        self._forced.set()
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    async def add(self, spec: Launchable) -> None:
        """Start one more process; returns when it is ready. Raises `StartupError` that says why it is not to be;
        the others go on."""
        assert self._group is not None
        assert spec.name not in self._specs
        self._specs[spec.name] = spec
        ready = self._was_ready[spec.name] = asyncio.Event()
        supervisor = self._supervisors[spec.name] = self._group.create_task(self._supervise(spec))
        became_ready = asyncio.ensure_future(ready.wait())
        await asyncio.wait({supervisor, became_ready}, return_when=asyncio.FIRST_COMPLETED)
        became_ready.cancel()
        if not ready.is_set():
            self._forget(spec.name)
            is_stopping = supervisor.cancelled() or self._stopping.is_set()
            raise StartupError("the launch is stopping" if is_stopping else supervisor.result())

    async def drain(self, name: str) -> bool:
        """End one process for good; False if it had to be killed. It has `drain_timeout_s` for its requests."""
        self._leaving.add(name)
        process = self._running.get(name)
        was_ready = process is not None and process.ready.is_set()
        if process is None:  # between two lives
            self._supervisors[name].cancel()
        else:
            await self._stop_stage({name: process}, self._settings.drain_timeout_s + DRAIN_MARGIN_S)
        await asyncio.wait({self._supervisors[name]}, timeout=KILL_GRACE_S)
        self._forget(name)
        return process is None or not was_ready or process.exit_code == 0  # who starts has no requests to end

    def state_of(self, name: str) -> str:
        """For people: starting, ready, draining, restarting."""
        if name in self._leaving:
            return "draining"
        process = self._running.get(name)
        if process is None:
            return "restarting"
        return "ready" if process.ready.is_set() else "starting"

    def pid_of(self, name: str) -> int:
        """0 between two lives."""
        process = self._running.get(name)
        return 0 if process is None else process.pid

    def _forget(self, name: str) -> None:
        for table in (self._specs, self._was_ready, self._supervisors):
            table.pop(name, None)
        self._leaving.discard(name)

    def on_event(self, name: str, event: ProcessEvent) -> None:
        self._view.on_event(name, event)
        if isinstance(event, Ready):
            self._was_ready[name].set()

    def on_log(self, name: str, line: str) -> None:
        self._view.on_log(name, line)

    def fail(self, message: str, stop_reason: str = "stopping the other processes") -> None:
        """End the launch; `run` raises the message."""
        if not self._stopping.is_set():
            self._failure = StartupError(message)
            self.stop(stop_reason)

    async def _follow(self) -> None:
        for event in tuple(self._was_ready.values()):
            await event.wait()
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await self._probe()
        except TimeoutError:
            self.fail(f"every process is ready, but the router does not answer within {self._probe_timeout_s:g} s")
            return
        self.is_serving = True
        self._view.on_serving()

    async def _supervise(self, spec: Launchable) -> str:
        """Until it is not to be started again; why, if it was never ready."""
        deaths: deque[float] = deque()
        while not self._stopping.is_set():
            try:
                how, last_words = await self._run_once(spec)
                failure = _obituary(f"{spec.name} could not start ({how})", last_words)
            except StartupError as error:
                how, last_words = "the start failed", error.message.splitlines()
                failure = error.message
            if self._stopping.is_set() or spec.name in self._leaving:
                return ""
            if self.is_serving and not self._was_ready[spec.name].is_set():  # it was added, the others serve
                self._view.on_log(spec.name, failure)
                return failure
            if not self.is_serving:
                self.fail(failure)
                return failure
            deaths.append(time.monotonic())
            while deaths[0] < deaths[-1] - RESTART_WINDOW_S:
                deaths.popleft()
            if len(deaths) > self._settings.max_restarts:
                died = f"{spec.name} died {len(deaths)} times within {RESTART_WINDOW_S:.0f} s (last: {how})"
                self.fail(_obituary(died, last_words))
                return ""
            pause_s = min(FIRST_RESTART_PAUSE_S * 2 ** (len(deaths) - 1), LONGEST_RESTART_PAUSE_S)
            self._view.on_death(spec.name, how, last_words, pause_s)
            await _wait_for(self._stopping, pause_s)
        return ""

    async def _run_once(self, spec: Launchable) -> tuple[str, list[str]]:
        """From start to end of one process: how it ended, and its last words."""
        self._view.on_start(spec.name)
        if not await _done_before(self._stopping, spec.prepare(self)):
            return "not started", []
        process = await spec.start(self)
        self._running[spec.name] = process
        if self._stopping.is_set():  # asked for while it was being started: it was not there to be drained
            process.send(signal.SIGKILL)
        timeout_s = self._settings.start_timeout_s
        watchdog = asyncio.get_running_loop().call_later(timeout_s, process.kill_unless_ready)
        try:
            await process.wait()
        finally:
            watchdog.cancel()
            del self._running[spec.name]
        how = f"not ready after {timeout_s:g} s" if process.was_too_slow else process.how_it_ended
        return how, process.last_words

    async def _stop_all(self) -> None:
        """In stop order, each stage bounded; what is left after its time is killed."""
        if not self.is_serving:
            await self._stop_stage(dict(self._running), ABORTED_START_GRACE_S)
            return
        for stop_order in sorted({spec.stop_order for spec in self._specs.values()}):
            stage = {name: run for name, run in self._running.items() if self._specs[name].stop_order == stop_order}
            self.killed += await self._stop_stage(stage, self._settings.drain_timeout_s + DRAIN_MARGIN_S)

    async def _stop_stage(self, stage: Mapping[str, RunningProcess], grace_s: float) -> list[str]:
        """The names of those that had to be killed."""
        for process in stage.values():
            process.send(signal.SIGTERM)
        all_exited = asyncio.ensure_future(_all_exited(stage.values()))
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait({all_exited, forced}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for waiter in (all_exited, forced):
            waiter.cancel()
        await asyncio.gather(all_exited, forced, return_exceptions=True)
        left = [name for name, process in stage.items() if not process.exited.is_set()]
        for name in left:
            stage[name].send(signal.SIGKILL)
        return left

    def _on_signal(self, number: signal.Signals) -> None:
        if self._told.request():
            self.stop(f"{number.name}: draining; after {ECHO_S:g} s another one stops at once")


async def _all_exited(processes: Iterable[RunningProcess]) -> None:
    for process in processes:
        await process.exited.wait()


def _obituary(what: str, last_words: Sequence[str]) -> str:
    if not last_words:
        return f"{what}; it said nothing"
    return "\n".join([f"{what}. Its last words:", *(f"    {line}" for line in last_words)])


async def _done_before(event: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do `work`, unless `event` comes first: then it is cancelled, and the answer is False."""
    worker, waiter = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({worker, waiter}, return_when=asyncio.FIRST_COMPLETED)
        is_done = worker.done()
    finally:
        for task in (worker, waiter):
            task.cancel()
        await asyncio.gather(worker, waiter, return_exceptions=True)
    if is_done:
        worker.result()
    return is_done


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return
