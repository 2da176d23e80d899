"""Every rank but 0: joins, is told its part, runs that worker, and stops when the router has drained.

A stop signal here is passed on to rank 0, because the router must drain first. When rank 0 is gone there is
nothing left to wait for. Both waits are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.control.worker_config import ADVERTISED_HOST_VARIABLE
from cluster.errors import ConfigError, StartupError, TandemError
from cluster.launch.external_channel import Channel, ChannelLost
from cluster.launch.external_identity import Identity
from cluster.launch.external_join import Dismissed, join
from cluster.launch.external_messages import (
    Assigned,
    Done,
    Failed,
    Listening,
    Refused,
    State,
    Stop,
    StopWanted,
    Trouble,
    first_line,
)
from cluster.launch.external_outcome import Outcome, Show, failed
from cluster.launch.external_signals import StopSignals
from cluster.launch.local import DRAIN_MARGIN_S, KILL_GRACE_S, LocalLauncher
from cluster.launch.ports import check_port_free, choose_free_port
from cluster.launch.process import ProcessSpec
from cluster.launch.run_directory import cluster_key_file, write_private
from cluster.launch.specs import worker_spec
from cluster.launch.topology import with_port
from cluster.launch.view import PlainView
from cluster.model_files.source import name_of_model
from cluster.process_events import ProcessEvent, Ready


class Follower:
    """One life of a rank that is not 0."""

    def __init__(self, config: ClusterConfig, identity: Identity, name: str, console: Console, show: Show) -> None:
        self._config = config
        self._identity = identity
        self._name = name
        self._console = console
        self._show = show
        self._signals = StopSignals()
        self._leader = "rank 0 (router)"
        self._trouble = ""
        self._is_ending = asyncio.Event()  # a signal has come, or the job is in trouble: rank 0 will say `Stop`

    async def run(self, directory: Path, key: bytes | None) -> Outcome:
        """`key`: the content of the user's key file, None without one."""
        with self._signals.handled():
            joining = join(self._identity, self._config, key, self._config.launch.join_timeout_s)
            try:
                channel, host = await self._signals.unless_stopped(joining, "this rank looked for rank 0")
            except Dismissed as dismissed:
                return Outcome(str(dismissed), 1)
            except TandemError as error:
                self._show(error)
                return failed(error)
            self._leader = f"rank 0 (router) on {host}"
            beating = asyncio.ensure_future(channel.beat())
            try:
                await self._take_part(channel, directory)
                channel.send(Done())
            except TandemError as error:
                self._show(error)
                channel.send(Failed(error.message))
                return failed(error)
            finally:
                beating.cancel()
                await channel.close()
        return Outcome(self._trouble, 1) if self._trouble else Outcome()

    async def _take_part(self, channel: Channel, directory: Path) -> None:
        assigned = await self._signals.unless_stopped(self._assigned(channel), "this rank waited for the others")
        spec, port = self._prepare(assigned, directory)
        channel.send(Listening(port))

        def report(state: str) -> None:
            channel.send(State(state, launcher.pid_of(spec.name)))

        view = _RankView(self._name, self._console, report)
        launcher = LocalLauncher([spec], self._config.launch, view, _at_once, handles_signals=False)
        failure: StartupError | None = None
        async with asyncio.TaskGroup() as group:
            watchers = [
                group.create_task(self._follow_leader(channel, launcher, view)),
                group.create_task(self._follow_signals(channel, launcher)),
                group.create_task(self._end_by_itself(launcher)),
            ]
            try:
                await launcher.run()
            except StartupError as error:
                failure = error
            for watcher in watchers:
                watcher.cancel()
        if failure is not None:
            raise failure

    async def _assigned(self, channel: Channel) -> Assigned:
        """Bounded by rank 0, which either assigns or refuses, or goes silent."""
        try:
            while True:
                match await channel.receive():
                    case Assigned() as assigned:
                        return assigned
                    case Refused(why):
                        raise StartupError(f"rank 0 has given up: {first_line(why)}")
        except ChannelLost as lost:
            raise StartupError(f"{self._leader} is gone before the start: {lost}") from None

    def _prepare(self, assigned: Assigned, directory: Path) -> tuple[ProcessSpec, int]:
        group = assigned.group
        if group.port:
            check_port_free(group.host, group.port, f"{group.role.value}.port")
        group = with_port(group, choose_free_port)
        reference = self._config.model.reference
        name = self._config.model.served_name or name_of_model(reference)
        spec = worker_spec(self._config, group, reference, name, directory, self._key_file(assigned, directory))
        if assigned.reachable_host != group.host:
            spec = replace(spec, environment={**spec.environment, ADVERTISED_HOST_VARIABLE: assigned.reachable_host})
        return spec, group.port

    def _key_file(self, assigned: Assigned, directory: Path) -> Path:
        if assigned.key:
            return write_private(directory / "cluster.key", assigned.key.encode())
        if not assigned.key_file:
            return cluster_key_file(directory, self._config.security.cluster_key_file)
        try:
            return cluster_key_file(directory, assigned.key_file)
        except ConfigError as error:
            raise ConfigError(
                "the ranks of one host share a key as a file of rank 0, which this rank cannot read (does it run in a "
                f"container of its own, or as another user?); set security.cluster_key_file. {error.message}"
            ) from error

    async def _follow_leader(self, channel: Channel, launcher: LocalLauncher, view: _RankView) -> None:
        try:
            while True:
                match await channel.receive():
                    case Trouble(why):
                        self._trouble = why
                        view.on_stop(f"{why}; ending, the router drains first")
                        self._is_ending.set()
                    case Refused(why):  # the router has not started: there is nothing to drain before this worker
                        self._trouble = why
                        _stop(launcher, f"rank 0 has given up: {first_line(why)}; ending")
                    case Stop():
                        _stop(launcher, "the router has drained, now this worker")
        except ChannelLost as lost:
            if not launcher.is_stopping:
                self._trouble = f"{self._leader} is gone: {lost}"
                launcher.stop(f"{self._trouble}; ending")

    async def _follow_signals(self, channel: Channel, launcher: LocalLauncher) -> None:
        await self._signals.wanted.wait()
        channel.send(StopWanted(self._signals.name))
        self._is_ending.set()
        await self._signals.forced.wait()
        launcher.kill()

    async def _end_by_itself(self, launcher: LocalLauncher) -> None:
        """Rank 0 has this long for its router; a `Stop` that has not come by then will not come."""
        await self._is_ending.wait()
        await asyncio.sleep(self._config.launch.drain_timeout_s + DRAIN_MARGIN_S + KILL_GRACE_S)
        _stop(launcher, "no word from rank 0: draining")


class _RankView(PlainView):
    """Lines under the name of the rank's part; rank 0 is told what state the worker is in."""

    def __init__(self, name: str, console: Console, report: Callable[[str], None]) -> None:
        super().__init__(None, console.file)
        self._name = name
        self._report = report

    def on_event(self, name: str, event: ProcessEvent) -> None:
        super().on_event(name, event)
        if isinstance(event, Ready):
            self._report("ready")

    def on_death(self, name: str, how: str, last_words: Sequence[str], restart_in_s: float) -> None:
        super().on_death(name, how, last_words, restart_in_s)
        self._report("restarting")

    def on_stop(self, reason: str) -> None:
        self.on_log(self._name, reason)


def _stop(launcher: LocalLauncher, reason: str) -> None:
    if not launcher.is_stopping:
        launcher.stop(reason)


async def _at_once() -> None:
    """A worker that is ready serves; whether the deployment does is for rank 0 to find out."""
