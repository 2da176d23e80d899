"""Rank 0 of an outer launcher: brings the ranks together, runs the router, ends the job in order.

gather -> assign -> addresses -> router starts -> every rank ready, router healthy -> serving
a signal here or at any rank      -> router drains -> Stop to all -> all done, exit 0
a rank failed or its connection ended -> Trouble to all -> the same order, exit 1
    before the router has started     -> Refused to all, exit 1
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.errors import StartupError, TandemError
from cluster.launch.command import answers_health
from cluster.launch.control_messages import Answer, Command, Deployment, Drain, Refused, Scale, Status, WorkerStatus
from cluster.launch.control_socket import control_server
from cluster.launch.external_identity import Identity
from cluster.launch.external_messages import (
    Assigned,
    Done,
    Failed,
    Listening,
    State,
    Stop,
    StopWanted,
    Trouble,
)
from cluster.launch.external_outcome import Outcome, Show, failed
from cluster.launch.external_parts import Part, Placement, check_hosts, parts_of, place
from cluster.launch.external_rendezvous import Gone, Rendezvous, open_rendezvous
from cluster.launch.external_signals import StopSignals
from cluster.launch.local import DRAIN_MARGIN_S, KILL_GRACE_S, PROBE_TIMEOUT_S, LocalLauncher
from cluster.launch.pools import with_load
from cluster.launch.ports import choose_free_port
from cluster.launch.specs import router_config, router_spec
from cluster.launch.topology import Topology, WorkerGroup, with_ports
from cluster.launch.view import PlainView, Serving
from cluster.model_files.source import name_of_model
from cluster.stop import ECHO_S

LISTENING_S = 30.0  # for all ranks to choose their ports
TELL_S = 20.0  # after its own start, for ranks to come and learn that the launch has failed; they start seconds apart


class Leader:
    """One life of rank 0."""

    def __init__(
        self, config: ClusterConfig, identity: Identity, topology: Topology, console: Console, show: Show
    ) -> None:
        self._config = config
        self._identity = identity
        self._topology = topology
        self._console = console
        self._show = show
        self._parts = parts_of(topology)
        self._states: dict[str, State] = {}
        self._all_ready = asyncio.Event()
        self._trouble = ""
        self._view = PlainView(None, console.file)
        self._signals = StopSignals()
        self._began_at = time.monotonic()

    async def run(self, directory: Path, key_file: Path, key: bytes | None) -> Outcome:
        """`key`: what the other ranks must prove to know, None without a key file of the user."""
        try:
            return await self._run(directory, key_file, key)
        except TandemError as error:  # no port for the rendezvous
            self._show(error)
            return failed(error)

    async def _run(self, directory: Path, key_file: Path, key: bytes | None) -> Outcome:
        with self._signals.handled():
            async with open_rendezvous(self._identity, self._config, key) as rendezvous:
                try:
                    groups = await self._signals.unless_stopped(
                        self._assemble(rendezvous, key_file), "rank 0 waited for the other ranks"
                    )
                    launcher = self._prepare(groups, directory)
                except TandemError as error:
                    self._show(error)
                    wait_s = max(self._began_at + TELL_S - time.monotonic(), 0.0)
                    refusing = rendezvous.refuse_everyone(error.message, wait_s)
                    await self._signals.until_stopped(refusing, otherwise=None)  # a signal has reached the others, too
                    return failed(error)
                async with control_server(directory, self._answer):
                    return await self._serve(rendezvous, launcher)

    async def _assemble(self, rendezvous: Rendezvous, key_file: Path) -> tuple[WorkerGroup, ...]:
        """All groups with the addresses under which they will listen."""
        starter, world_size = self._identity.starter, self._identity.world_size
        self._view.on_stop(f"rank 0 of {world_size}, started by {starter}; waiting for the others")
        seats = await rendezvous.gather(self._config.launch.join_timeout_s)
        check_hosts(seats, self._config)
        placements = place(self._topology, self._config, seats, rendezvous.leader_address)
        is_one_host = len({seat.address for seat in seats}) == 1
        for part in self._workers():
            assert part.group is not None
            rendezvous.send(part.rank, self._assignment(placements[part.group.name], key_file, is_one_host))
        ports = await self._ports(rendezvous)
        for part in self._workers():
            where = rendezvous.host_of(part.rank)
            self._view.on_log(part.name, f"rank {part.rank} on {where}, port {ports[part.rank]}")
        return tuple(
            replace(placements[part.group.name].reachable, port=ports[part.rank])
            for part in self._workers()
            if part.group is not None and part.group_rank == 0
        )

    def _assignment(self, placement: Placement, key_file: Path, is_one_host: bool) -> Assigned:
        """The key itself goes over a connection only if the user said so; on one host the file's mode protects it."""
        security = self._config.security
        own_key = not security.cluster_key_file
        assert is_one_host or not own_key or security.send_key_over_network, "refused by check_hosts"
        return Assigned(
            group=placement.group,
            reachable_host=placement.reachable_host,
            key_file=str(key_file) if own_key and is_one_host else "",
            key=key_file.read_text() if own_key and not is_one_host else "",
        )

    async def _ports(self, rendezvous: Rendezvous) -> Mapping[int, int]:
        ports: dict[int, int] = {}
        missing = {part.rank for part in self._workers()}
        try:
            async with asyncio.timeout(LISTENING_S):
                while missing:
                    rank, news = await rendezvous.news.get()
                    match news:
                        case Listening(port):
                            ports[rank] = port
                            missing.discard(rank)
                        case State():  # of a rank that is faster than the last one's choice
                            self._note_state(rank, news)
                        case StopWanted(why):
                            raise StartupError(f"{why} at {self._who(rendezvous, rank)}, before all had their ports")
                        case Failed(why):
                            raise StartupError(f"{self._who(rendezvous, rank)} has failed: {why}")
                        case Gone(why):
                            raise StartupError(f"{self._who(rendezvous, rank)} is gone: {why}")
        except TimeoutError:
            raise StartupError(f"ranks {sorted(missing)} have chosen no port within {LISTENING_S:g} s") from None
        return ports

    def _prepare(self, groups: tuple[WorkerGroup, ...], directory: Path) -> LocalLauncher:
        router_only = with_ports(replace(self._topology, groups=()), choose_free_port)
        self._topology = replace(router_only, groups=groups)
        config = router_config(self._config, self._topology, self._config.model.reference, self._serving_name())
        serving = Serving(self._topology.router.url, self._serving_name(), self._topology.summary)
        self._view = PlainView(serving, self._console.file)

        async def probe() -> None:
            await self._all_ready.wait()
            await answers_health(serving)

        return LocalLauncher(
            [router_spec(config, directory)],
            self._config.launch,
            self._view,
            probe,
            probe_timeout_s=self._config.launch.start_timeout_s + PROBE_TIMEOUT_S,
            handles_signals=False,
        )

    async def _serve(self, rendezvous: Rendezvous, launcher: LocalLauncher) -> Outcome:
        outcome = Outcome()
        async with asyncio.TaskGroup() as group:
            watchers = [
                group.create_task(self._follow_news(rendezvous, launcher)),
                group.create_task(self._follow_signals(launcher)),
            ]
            try:
                await launcher.run()
            except StartupError as error:
                self._show(error)
                outcome = failed(error)
                rendezvous.broadcast(Trouble(f"rank 0 (router) on {rendezvous.host_of(0)} has failed: {error.message}"))
            for watcher in watchers:
                watcher.cancel()
        await self._stop_workers(rendezvous)
        return Outcome(self._trouble, 1) if self._trouble else outcome

    async def _follow_news(self, rendezvous: Rendezvous, launcher: LocalLauncher) -> None:
        while True:
            rank, news = await rendezvous.news.get()
            who = self._who(rendezvous, rank)
            match news:
                case State():
                    self._note_state(rank, news)
                case StopWanted(why):
                    self._stop(launcher, f"{why} at {who}: draining, the router first")
                case Failed(why):
                    self._end_job(rendezvous, launcher, f"{who} has failed: {why}")
                case Gone(why):
                    self._end_job(rendezvous, launcher, f"{who} is gone: {why}")
                case Done():
                    self._end_job(rendezvous, launcher, f"{who} has ended")

    async def _follow_signals(self, launcher: LocalLauncher) -> None:
        await self._signals.wanted.wait()
        self._stop(
            launcher, f"{self._signals.name}: draining, the router first; after {ECHO_S:g} s another stops at once"
        )
        await self._signals.forced.wait()
        launcher.kill()

    def _stop(self, launcher: LocalLauncher, reason: str) -> None:
        if not launcher.is_stopping:
            launcher.stop(reason)

    def _end_job(self, rendezvous: Rendezvous, launcher: LocalLauncher, why: str) -> None:
        """The first one ends the job; what follows from it says nothing new."""
        if not self._trouble:
            self._trouble = why
            rendezvous.broadcast(Trouble(why))
            self._view.on_stop(f"{why}; ending the job")
        self._stop(launcher, "draining, the router first")

    def _note_state(self, rank: int, state: State) -> None:
        self._states[self._parts[rank].name] = state
        names = [part.name for part in self._workers()]
        if all(name in self._states and self._states[name].state == "ready" for name in names):
            self._all_ready.set()

    async def _stop_workers(self, rendezvous: Rendezvous) -> None:
        """Bounded: a rank that does not end in the time that its worker has is left to the outer launcher."""
        rendezvous.broadcast(Stop())
        grace_s = self._config.launch.drain_timeout_s + DRAIN_MARGIN_S + KILL_GRACE_S
        waiting = asyncio.ensure_future(self._all_gone(rendezvous))
        forced = asyncio.ensure_future(self._signals.forced.wait())
        await asyncio.wait({waiting, forced}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, forced):
            task.cancel()
        await asyncio.gather(waiting, forced, return_exceptions=True)
        for rank in sorted(rendezvous.connected):
            self._view.on_stop(f"{self._who(rendezvous, rank)} has not ended")

    async def _all_gone(self, rendezvous: Rendezvous) -> None:
        while rendezvous.connected:
            await rendezvous.news.get()

    async def _answer(self, command: Command) -> AsyncIterator[Answer]:
        """On the control socket: `cluster status` works, changes do not."""
        match command:
            case Status():
                workers = await asyncio.gather(*(with_load(self._known(part)) for part in self._workers()))
                yield Deployment(self._topology.router.url, self._serving_name(), tuple(workers))
            case Drain() | Scale():
                yield Refused(
                    f"the ranks of {self._identity.starter} are fixed: each runs one part until the end; "
                    "start another job to have other pools"
                )

    def _known(self, part: Part) -> WorkerStatus:
        [group] = [group for group in self._topology.groups if part.group is not None and group.name == part.group.name]
        state = self._states.get(part.name, State("starting", 0))
        return WorkerStatus(part.name, group.role, group.address, state.state, state.pid)

    def _serving_name(self) -> str:
        return self._config.model.served_name or name_of_model(self._config.model.reference)

    def _workers(self) -> tuple[Part, ...]:
        return self._parts[1:]

    def _who(self, rendezvous: Rendezvous, rank: int) -> str:
        return f"rank {rank} ({self._parts[rank].name}) on {rendezvous.host_of(rank)}"
