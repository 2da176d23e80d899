"""One rank of a launch that an outer launcher has started: torchrun, srun, mpirun, a LeaderWorkerSet.

    python -m cluster launch cluster.yaml, once for each rank
        external_identity   which rank am I?                      (pure)
        external_parts      what does that rank run, and on what? (pure)
        external_leader     rank 0: rendezvous, router, the order of stopping
        external_follower   the others: one worker each

A rank is a small process that supervises its part as a child, as a launch without an outer launcher does. It
never signals its siblings or the launcher's process group: what one rank must know of another goes over the
rendezvous.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, StartupError, TandemError
from cluster.launch.cores import usable_cores
from cluster.launch.external_follower import Follower
from cluster.launch.external_identity import Identity
from cluster.launch.external_join import report_problem
from cluster.launch.external_leader import TELL_S, Leader
from cluster.launch.external_outcome import Outcome, Show, failed, tell_torchrun
from cluster.launch.external_parts import check_world, parts_of
from cluster.launch.external_rendezvous import open_rendezvous
from cluster.launch.external_signals import StopSignals
from cluster.launch.ports import check_port_free
from cluster.launch.run_directory import cluster_key_file, run_directory
from cluster.launch.topology import Topology, plan_topology

LISTEN_FOR_RANK_0_S = TELL_S  # a rank that cannot start: for rank 0 to say why


def launch_external(config: ClusterConfig, identity: Identity, console: Console, show: Show) -> int:
    """Blocks until this rank's part has ended; the exit code. Errors of our tree have been shown then."""
    try:
        with run_directory() as directory:
            outcome = _run(config, identity, directory, console, show)
    except TandemError as error:  # no private directory
        show(error)
        outcome = failed(error)
    tell_torchrun(outcome, os.environ)
    return outcome.exit_code


def _run(config: ClusterConfig, identity: Identity, directory: Path, console: Console, show: Show) -> Outcome:
    given = config.security.cluster_key_file
    try:
        topology = _checked(config, identity)
        key_file = cluster_key_file(directory, given) if given or identity.rank == 0 else None
    except TandemError as problem:
        return asyncio.run(_fail_together(config, identity, problem, show))
    key = key_file.read_bytes().strip() if given and key_file is not None else None
    if identity.rank == 0:
        assert key_file is not None
        return asyncio.run(Leader(config, identity, topology, console, show).run(directory, key_file, key))
    name = parts_of(topology)[identity.rank].name
    return asyncio.run(Follower(config, identity, name, console, show).run(directory, key))


def _checked(config: ClusterConfig, identity: Identity) -> Topology:
    """What each rank can see by itself. Raises `ConfigError` or `StartupError`."""
    topology = plan_topology(config, usable_cores())
    check_world(topology, config, identity.world_size, identity.starter)
    if not identity.is_local and not config.security.allow_plaintext_network:
        raise ConfigError(
            f"the ranks of {identity.starter} meet at {identity.host}, beyond this machine, and nothing between them "
            "is encrypted; accept it with `security.allow_plaintext_network: true`"
        )
    if identity.rank == 0 and config.router.port:
        check_port_free(config.router.host, config.router.port, "router.port")
    return topology


async def _fail_together(config: ClusterConfig, identity: Identity, problem: TandemError, show: Show) -> Outcome:
    """One message of one rank: rank 0 shows it, the others learn that it has, and all end.

    Without the permission to talk over a network there is no rendezvous, and each shows its own.
    """
    if not identity.is_local and not config.security.allow_plaintext_network:
        show(problem)
        return failed(problem)
    signals = StopSignals()
    with signals.handled():
        if identity.rank > 0:
            reporting = report_problem(identity, config, problem.message, LISTEN_FOR_RANK_0_S)
            if not await signals.until_stopped(reporting, otherwise=False):
                show(problem)
            return failed(problem)
        show(problem)
        with suppress(StartupError):  # no port: the others will say it themselves
            async with open_rendezvous(identity, config, None) as rendezvous:
                await signals.until_stopped(rendezvous.refuse_everyone(problem.message, TELL_S), otherwise=None)
    return failed(problem)
