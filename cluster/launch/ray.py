"""`cluster launch --ray`: router here (or where Ray puts it), workers where Ray puts them.

    this process                         Ray                           nodes
    topology, launcher, pools  ------->  placement groups, actors  --> python -m prefill | decode
         |  router process                                                  ^
         `------ clients -> router -- gRPC, not through Ray ----------------'

Placement groups and actors are not detached: they end with this process, however it ends.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.launch.command import answers_health, check_ports, find_model, run_with_control, show_warnings
from cluster.launch.gpus import shares_of_others
from cluster.launch.local import LocalLauncher
from cluster.launch.pools import Members, WorkerPools
from cluster.launch.ports import choose_free_port
from cluster.launch.process import ProcessSpec
from cluster.launch.ray_cluster import RayCluster, connected
from cluster.launch.ray_plan import check_ray
from cluster.launch.ray_workers import Blueprint, RayRouter, RayWorker
from cluster.launch.run_directory import cluster_key_file, run_directory
from cluster.launch.specs import following_members, router_config, router_spec, write_members
from cluster.launch.topology import Topology, plan_topology, with_ports
from cluster.launch.view import Serving, launch_view
from cluster.types import Role

HEADLESS_DRAIN_S = 15.0  # without a head Ray ends its drivers and actors within a minute: we end before that


def launch_ray(config: ClusterConfig, console: Console) -> None:
    """Blocks until the deployment has ended. Raises an error of our tree when it could not start, when a process died
    for good, or when Ray is gone."""
    check_ray(config)
    show_warnings(console, shares_of_others(config))
    topology = plan_topology(config, num_cores=1)
    if config.launch.ray.router == "driver":
        front = replace(topology, groups=())
        check_ports(front)
        topology = replace(topology, router=with_ports(front, choose_free_port).router)
    model = find_model(config.model.reference, console)
    model_name = config.model.served_name or model.name
    serving = Serving(url=topology.router.url, model_name=model_name, summary=f"{topology.summary}, placed by Ray")
    with ExitStack() as stack:
        directory = stack.enter_context(run_directory())
        key_file = cluster_key_file(directory, config.security.cluster_key_file)
        for role in Role:
            write_members(directory, role, ())
        blueprint = Blueprint(config, model, model_name, key_file, Members(directory))
        with console.status("connecting to Ray"):
            cluster = stack.enter_context(connected(config.launch.ray, console.print))
        router = _router(cluster, blueprint, topology, serving, directory)
        workers = [RayWorker(cluster, blueprint, group) for group in topology.groups]
        processes = [router, *workers]
        view = stack.enter_context(launch_view(serving, [process.name for process in processes], console))
        launcher = LocalLauncher(processes, config.launch, view, lambda: answers_health(serving))
        pools = WorkerPools(
            launcher, config, serving, workers, lambda group, _: RayWorker(cluster, blueprint, group), blueprint.members
        )
        asyncio.run(_run(cluster, launcher, pools, router, directory))


def _router(
    cluster: RayCluster, blueprint: Blueprint, topology: Topology, serving: Serving, directory: Path
) -> ProcessSpec | RayRouter:
    config = blueprint.config
    if config.launch.ray.router == "actor":
        return RayRouter(cluster, blueprint, topology, serving)
    router = router_config(config, topology, blueprint.model, blueprint.model_name)
    return router_spec(following_members(router, directory), directory)


async def _run(
    cluster: RayCluster, launcher: LocalLauncher, pools: WorkerPools, router: ProcessSpec | RayRouter, directory: Path
) -> None:
    def on_loss(why: str) -> None:
        launcher.fail(why, f"{why}: stopping")
        asyncio.get_running_loop().call_later(HEADLESS_DRAIN_S, launcher.stop, "")

    watch = asyncio.create_task(cluster.watch_head(on_loss))
    try:
        await run_with_control(launcher, pools, directory)
    finally:
        watch.cancel()
        await asyncio.wait({watch})
        await pools.close()
        if isinstance(router, RayRouter):
            await router.close()
