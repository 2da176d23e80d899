"""Which processes a configuration means. Pure: no sockets, no clock, no files.

    ClusterConfig -> plan_topology -> Topology: router + groups, each group one or more ranks

A group is what the router sees as one worker; its ranks are operating-system processes. Today a group
has one rank; tensor and pipeline parallel degrees will add ranks here and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.addresses import join_address
from cluster.config import ClusterConfig, PoolSettings
from cluster.errors import ConfigError
from cluster.types import Role

MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a group."""

    index: int
    device: str
    num_threads: int
    stage: int = 0  # of the pipeline; the ranks of one stage share a node
    gpu_percent: int | None = None  # share of a GPU's multiprocessors; None: all
    num_sharers: int = 1  # ranks on the same GPU, this one included


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One worker as the router sees it. `port` 0: chosen before the start (`with_ports`)."""

    name: str  # "prefill-0"
    role: Role
    host: str
    port: int
    ranks: tuple[Rank, ...]

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """The HTTP front. In a monolithic topology the one worker group lives in the same process."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{join_address(reachable, self.port)}"


@dataclass(frozen=True, slots=True)
class Topology:
    router: RouterProcess
    groups: tuple[WorkerGroup, ...]
    is_monolithic: bool

    def of_role(self, role: Role) -> tuple[WorkerGroup, ...]:
        return tuple(group for group in self.groups if group.role is role)

    @property
    def summary(self) -> str:
        """`2 prefill workers, 1 decode worker`."""
        if self.is_monolithic:
            return "monolithic"
        counts = [(len(self.of_role(role)), role.value) for role in (Role.PREFILL, Role.DECODE)]
        return ", ".join(f"{count} {role} worker{'s' if count > 1 else ''}" for count, role in counts)

    @property
    def num_processes(self) -> int:
        return 1 if self.is_monolithic else 1 + sum(len(group.ranks) for group in self.groups)


def plan_topology(config: ClusterConfig, num_cores: int) -> Topology:
    """The processes of a checked config on a machine with `num_cores` usable cores.

    Raises `ConfigError` naming the keys that cannot go together.
    """
    assert num_cores >= 1
    router = RouterProcess(host=config.router.host, port=config.router.port)
    if config.monolithic:
        _refuse_pools_of_monolithic(config)
        rank = _rank(config.decode, default_threads=num_cores)
        group = WorkerGroup(name="decode-0", role=Role.DECODE, host=config.decode.host, port=0, ranks=(rank,))
        return Topology(router=router, groups=(group,), is_monolithic=True)
    _refuse_impossible_pairs(config)
    num_workers = config.prefill.replicas + config.decode.replicas
    groups = (
        *_groups(Role.PREFILL, config.prefill, _threads_per_worker(config, config.prefill, num_workers, num_cores)),
        *_groups(Role.DECODE, config.decode, _threads_per_worker(config, config.decode, num_workers, num_cores)),
    )
    topology = Topology(router=router, groups=groups, is_monolithic=False)
    _refuse_port_collisions(topology)
    return topology


def with_ports(topology: Topology, choose_port: Callable[[str], int]) -> Topology:
    """The same topology with every port 0 replaced by `choose_port(host)`."""
    router = topology.router
    if router.port == 0:
        router = replace(router, port=choose_port(router.host))
    if topology.is_monolithic:
        return replace(topology, router=router)
    groups = tuple(with_port(group, choose_port) for group in topology.groups)
    return replace(topology, router=router, groups=groups)


def with_port(group: WorkerGroup, choose_port: Callable[[str], int]) -> WorkerGroup:
    return replace(group, port=choose_port(group.host)) if group.port == 0 else group


def next_group(like: WorkerGroup, present: Sequence[WorkerGroup], first_port: int) -> WorkerGroup:
    """One more worker beside `present`, with the ranks of `like` and the lowest free number.

    `first_port` 0: its port is to be chosen. Raises `ConfigError` when the numbered ports end.
    """
    taken = {group.name for group in present}
    index = next(index for index in itertools.count() if f"{like.role.value}-{index}" not in taken)
    port = first_port + index if first_port else 0
    if port > MAX_PORT:
        raise ConfigError(f"{like.role.value}-{index} would need port {port}, the highest is {MAX_PORT}")
    return replace(like, name=f"{like.role.value}-{index}", port=port)


def _groups(role: Role, pool: PoolSettings, num_threads: int) -> Iterator[WorkerGroup]:
    last_port = pool.port + pool.replicas - 1
    if pool.port and last_port > MAX_PORT:
        raise ConfigError(
            f"{role.value}.port: {pool.replicas} workers from port {pool.port} on would need port {last_port}, "
            f"the highest is {MAX_PORT}"
        )
    for index in range(pool.replicas):
        yield WorkerGroup(
            name=f"{role.value}-{index}",
            role=role,
            host=pool.host,
            port=pool.port + index if pool.port else 0,
            ranks=(_rank(pool, num_threads),),
        )


def _rank(pool: PoolSettings, default_threads: int) -> Rank:
    return Rank(index=0, device=pool.engine.device, num_threads=pool.engine.num_threads or default_threads)


def _threads_per_worker(config: ClusterConfig, pool: PoolSettings, num_workers: int, num_cores: int) -> int:
    """Shared: prefill and decode seldom compute at the same time for one request, so each pool gets all
    cores and a lone request is as fast as on one process. Split: no core has two workers. With Ray the
    cores of this machine say nothing about those of a worker's node: it has what is reserved for it."""
    if config.launch.backend == "ray":
        return max(1, int(config.launch.ray.cpus_per_rank or 1))
    match config.launch.cpu_threads:
        case "shared":
            return max(1, num_cores // pool.replicas)
        case "split":
            return max(1, num_cores // num_workers)


def _refuse_pools_of_monolithic(config: ClusterConfig) -> None:
    for name, pool in (("prefill", config.prefill), ("decode", config.decode)):
        if pool.replicas > 1:
            raise ConfigError(
                f"{name}.replicas: {pool.replicas} workers do not fit `monolithic: true`, which is one process; "
                "remove one of the two"
            )


def _refuse_impossible_pairs(config: ClusterConfig) -> None:
    if config.connector.transport == "loopback":
        raise ConfigError(
            "connector.transport: loopback works inside one process only, and prefill and decode workers are "
            "separate processes; use nixl, or `monolithic: true`"
        )
    prefill, decode = config.prefill.engine, config.decode.engine
    if prefill.max_model_len and decode.max_model_len and prefill.max_model_len > decode.max_model_len:
        raise ConfigError(
            f"prefill.engine.max_model_len ({prefill.max_model_len}) is larger than decode.engine.max_model_len "
            f"({decode.max_model_len}): prompts would be computed that no decode worker can take"
        )


def _refuse_port_collisions(topology: Topology) -> None:
    taken: dict[int, str] = {}
    listeners = [("router", topology.router.port), *((group.name, group.port) for group in topology.groups)]
    for name, port in listeners:
        if port and port in taken:
            raise ConfigError(f"{taken[port]} and {name} would both listen on port {port}; give one of them another")
        taken[port] = name


def fewest_users(users: Mapping[str, int], num_gpus: int) -> int:
    """The number of the GPU that is used least, the lowest of several. `users`: by device; absent: none."""
    return min(range(num_gpus), key=lambda number: users.get(f"cuda:{number}", 0))
