"""What `cluster launch` does, from a checked configuration to the end of the last process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cluster.config import ClusterConfig
from cluster.errors import TandemError, WorkerLost
from cluster.gpu_share import has_mps
from cluster.launch.control_socket import control_server
from cluster.launch.cores import usable_cores
from cluster.launch.external_facts import visible_gpus
from cluster.launch.external_identity import read_identity
from cluster.launch.gpus import (
    place_on_gpus,
    shared_gpus,
    shares_of_others,
    shares_without_effect,
    with_a_gpu,
    without_shares,
)
from cluster.launch.local import LocalLauncher
from cluster.launch.mps import mps_daemon
from cluster.launch.pools import LocalWorker, Members, WorkerPools
from cluster.launch.ports import check_port_free, choose_free_port
from cluster.launch.run_directory import cluster_key_file, run_directory
from cluster.launch.specs import process_specs, worker_spec
from cluster.launch.topology import Topology, WorkerGroup, plan_topology, with_port, with_ports
from cluster.launch.view import Serving, launch_view
from cluster.model_files.source import ModelSource, resolve_model

PROBE_PAUSE_S = 0.1
PROBE_ANSWER_S = 5.0


def launch_here(config: ClusterConfig, console: Console, show: Callable[[TandemError], None]) -> int:
    """As one rank of an outer launcher if one has started this process, else all of it; the exit code.

    Blocks until the end. Errors of our tree are raised, or have been given to `show`.
    """
    launch = config.launch
    identity = read_identity(os.environ, launch.external, launch.rendezvous_host)
    if identity is None or (config.monolithic and identity.world_size == 1):
        launch_local(config, console)
        return 0
    from cluster.launch.external import launch_external

    if identity.rank == 0:
        show_warnings(console, shares_of_others(config))
    return launch_external(config, identity, console, show)


def launch_local(config: ClusterConfig, console: Console) -> None:
    """Blocks until the deployment has ended. Raises an error of our tree when it could not start, or
    when a process died for good."""
    has_daemon = has_mps()
    topology = place_on_gpus(
        plan_topology(config, usable_cores()), config, visible_gpus(os.environ), has_daemon=has_daemon
    )
    show_warnings(console, shares_without_effect(topology, config))
    check_ports(topology)
    model = find_model(config.model.reference, console)
    config = _with_draft_model_found(config, console)
    topology = with_ports(topology, choose_free_port)
    model_name = config.model.served_name or model.name
    with run_directory() as directory, mps_daemon(bool(shared_gpus(topology)), directory) as warning:
        shares_apply = has_daemon or (bool(shared_gpus(topology)) and warning is None)
        if warning is not None:
            show_warnings(console, [warning])
        if not shares_apply:
            topology = without_shares(topology)
        key_file = cluster_key_file(directory, config.security.cluster_key_file)
        specs = process_specs(config, topology, model, model_name, directory, key_file)
        serving = Serving(url=topology.router.url, model_name=model_name, summary=topology.summary)

        def make_worker(group: WorkerGroup, present: Sequence[WorkerGroup]) -> LocalWorker:
            group = with_a_gpu(
                group, present, config, visible_gpus(os.environ), has_daemon=has_daemon, has_mps=shares_apply
            )
            group = with_port(group, choose_free_port)
            spec = worker_spec(config, group, model, model_name, directory, key_file)
            return LocalWorker(group, spec, directory)

        of_workers = specs if topology.is_monolithic else specs[1:]
        workers = [LocalWorker(*pair, directory) for pair in zip(topology.groups, of_workers, strict=True)]
        with launch_view(serving, [spec.name for spec in specs], console) as view:
            launcher = LocalLauncher(specs, config.launch, view, lambda: answers_health(serving))
            members = Members(directory, topology.groups)
            pools = WorkerPools(launcher, config, serving, workers, make_worker, members)
            asyncio.run(run_with_control(launcher, pools, directory))
    if launcher.killed:
        raise WorkerLost(f"{', '.join(launcher.killed)} had to be killed: requests may have been cut")


def show_warnings(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"[yellow]warning[/] {warning}")


async def run_with_control(launcher: LocalLauncher, pools: WorkerPools, directory: Path) -> None:
    async with control_server(directory, pools.handle):
        await launcher.run()


def check_ports(topology: Topology) -> None:
    """Fail before anything is loaded when a port that was asked for is taken."""
    listeners = [("router.port", topology.router.host, topology.router.port)]
    listeners += [(f"{group.role.value}.port", group.host, group.port) for group in topology.groups]
    for key, host, port in listeners:
        if port:
            check_port_free(host, port, key)


def _with_draft_model_found(config: ClusterConfig, console: Console) -> ClusterConfig:
    speculation = config.decode.engine.speculation
    if speculation.draft_model is None:
        return config
    path = str(find_model(speculation.draft_model, console).path)
    speculation = msgspec.structs.replace(speculation, draft_model=path)
    engine = msgspec.structs.replace(config.decode.engine, speculation=speculation)
    return msgspec.structs.replace(config, decode=msgspec.structs.replace(config.decode, engine=engine))


def find_model(reference: str, console: Console) -> ModelSource:
    """Fetch it once, here, rather than in every process."""
    columns = (TextColumn("[cyan]     model[/] │ {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("fetching", total=None, visible=False)

        def show(done_bytes: int, total_bytes: int) -> None:
            progress.update(task, completed=done_bytes, total=total_bytes, visible=True)

        return resolve_model(reference, show)


async def answers_health(serving: Serving) -> None:
    """Returns once GET /health says 200: the router has found its workers."""
    import httpx  # takes long to import, and only a launch that got this far needs it

    async with httpx.AsyncClient(timeout=PROBE_ANSWER_S, trust_env=False) as client:
        while True:
            try:
                if (await client.get(f"{serving.url}/health")).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet: the caller bounds the wait
            await asyncio.sleep(PROBE_PAUSE_S)
