"""From topology and configuration to the processes to be started: their config files, commands, environments."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig
from cluster.control.worker_config import WorkerConfig
from cluster.engine.config import DEFAULT_GPU_FRACTION, EngineConfig
from cluster.gpu_share import SHARE_VARIABLE
from cluster.launch.monolithic_config import MonolithicConfig
from cluster.launch.process import ProcessSpec
from cluster.launch.run_directory import replace_private, write_config
from cluster.launch.topology import Rank, Topology, WorkerGroup
from cluster.model_files.source import ModelSource
from cluster.router.config import RouterConfig
from cluster.types import Role

ROUTER_STOPS_FIRST, WORKERS_STOP_LAST = 0, 1


def process_specs(
    config: ClusterConfig,
    topology: Topology,
    model: ModelSource,
    model_name: str,
    directory: Path,
    key_file: Path,
) -> list[ProcessSpec]:
    """Write each process's config into `directory` and say how it is started. All ports are chosen."""
    router = router_config(config, topology, model, model_name)
    if topology.is_monolithic:
        (group,) = topology.groups
        worker = worker_config(config, group, model, model_name, key_file)
        worker = msgspec.structs.replace(worker, transport="loopback", host="127.0.0.1", port=0, cluster_key_file="")
        path = write_config(directory, "monolithic", MonolithicConfig(router=router, worker=worker))
        command = ("cluster.launch.monolithic", "--config", str(path))
        return [ProcessSpec(name="monolithic", command=command, environment=process_environment(group))]
    for role in Role:
        write_members(directory, role, topology.groups)
    workers = [worker_spec(config, group, model, model_name, directory, key_file) for group in topology.groups]
    return [router_spec(following_members(router, directory), directory), *workers]


def following_members(router: RouterConfig, directory: Path) -> RouterConfig:
    """The router told to find its workers in the members files in `directory`."""
    prefill, decode = (f"file:{directory / members_name(role)}" for role in (Role.PREFILL, Role.DECODE))
    return msgspec.structs.replace(router, prefill=(prefill,), decode=(decode,))


def router_spec(router: RouterConfig, directory: Path) -> ProcessSpec:
    """Write the router's config and say how it is started."""
    path = write_config(directory, "router", router)
    command = ("cluster.router", "--config", str(path))
    return ProcessSpec(name="router", command=command, stop_order=ROUTER_STOPS_FIRST)


def worker_spec(
    config: ClusterConfig,
    group: WorkerGroup,
    model: ModelSource | str,
    model_name: str,
    directory: Path,
    key_file: Path,
) -> ProcessSpec:
    """Write the config of one worker, whose port is chosen, and say how it is started.

    `model`: what was found on this machine, or a reference that the process itself resolves.
    """
    path = write_config(directory, group.name, worker_config(config, group, model, model_name, key_file))
    return ProcessSpec(
        name=group.name,
        command=(group.role.value, "--config", str(path)),
        environment=process_environment(group),
        stop_order=WORKERS_STOP_LAST,
    )


def write_members(directory: Path, role: Role, groups: Iterable[WorkerGroup]) -> Path:
    """Tell the router which workers of `role` there are, and their names; it follows this file."""
    addresses = {group.name: group.address for group in groups if group.role is role}
    return replace_private(directory / members_name(role), msgspec.json.encode(addresses))


def members_name(role: Role) -> str:
    return f"{role.value}.members"


def router_config(config: ClusterConfig, topology: Topology, model: ModelSource | str, model_name: str) -> RouterConfig:
    tuning = {
        name: value for name, value in msgspec.structs.asdict(config.router).items() if name not in ("host", "port")
    }
    return RouterConfig(
        model_name=model_name,
        model_path=model if isinstance(model, str) else str(model.path),
        prefill=tuple(group.address for group in topology.of_role(Role.PREFILL)),
        decode=() if topology.is_monolithic else tuple(group.address for group in topology.of_role(Role.DECODE)),
        host=topology.router.host,
        port=topology.router.port,
        drain_timeout_s=config.launch.drain_timeout_s,
        log_level=config.logging.level,
        log_format=config.logging.format,
        **tuning,
    )


def worker_config(
    config: ClusterConfig, group: WorkerGroup, model: ModelSource | str, model_name: str, key_file: Path
) -> WorkerConfig:
    pool = config.pool(group.role)
    (rank,) = group.ranks
    return WorkerConfig(
        model=model if isinstance(model, str) else str(model.path),
        model_name=model_name,
        model_revision="" if isinstance(model, str) else model.revision,
        model_quantization=config.model.quantization,
        model_residual_dtype=config.model.residual_dtype,
        host=group.host,
        port=group.port,
        engine=_engine(pool.engine, rank),
        cluster_key_file=str(key_file),
        lease_s=config.connector.lease_s,
        load_timeout_s=config.connector.load_timeout_s,
        on_failure=config.connector.on_failure,
        drain_timeout_s=config.launch.drain_timeout_s,
        allow_plaintext_network=config.security.allow_plaintext_network,
        log_level=config.logging.level,
        log_format=config.logging.format,
    )


def _engine(engine: EngineConfig, rank: Rank) -> EngineConfig:
    fraction = engine.gpu_memory_fraction
    if fraction is None and rank.num_sharers > 1:
        fraction = DEFAULT_GPU_FRACTION / rank.num_sharers
    return msgspec.structs.replace(
        engine, num_threads=rank.num_threads, device=rank.device, gpu_memory_fraction=fraction
    )


def process_environment(group: WorkerGroup) -> dict[str, str]:
    """Libraries outside of the kernels take their number of threads from here, and CUDA its share of a GPU."""
    rank = group.ranks[0]
    environment = {"OMP_NUM_THREADS": str(rank.num_threads)}
    if rank.gpu_percent is not None:
        environment[SHARE_VARIABLE] = str(rank.gpu_percent)
    return environment
