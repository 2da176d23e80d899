"""Which worker computes on which GPU, and with what share of it. Pure.

A pool whose device is `cuda` takes the GPUs one after the other, prefill first, each time one that fewest have; so
workers share where there are fewer GPUs than workers. `cuda:1` is taken as it is said, and counts for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.config import ClusterConfig, PoolSettings
from cluster.engine.config import DEFAULT_GPU_FRACTION
from cluster.errors import ConfigError
from cluster.launch.topology import Rank, Topology, WorkerGroup, fewest_users
from cluster.types import Role

# Of the multiprocessors, for workers that share a GPU with the other role and were not told. Measured on
# one GPU (docs/log.md, benchmark split_gpu): a decode step is short and waits for memory, so it may use all, and
# what a prompt leaves of the multiprocessors is enough for it: with 80 % both are served sooner than with 60 or 40 %.
DEFAULT_PERCENT = {Role.PREFILL: 80, Role.DECODE: 100}


def place_on_gpus(topology: Topology, config: ClusterConfig, num_gpus: int, *, has_daemon: bool) -> Topology:
    """The same topology with a numbered GPU for every rank that computes on one.

    `has_daemon`: the operator runs MPS. A rank that has a GPU to itself has a share of it only then: without MPS a
    share does nothing, but a worker that is told of one does without the library's products (`gpu_share.py`).
    Raises `ConfigError` that names the pool when there is no such GPU.
    """
    if not any(rank.device.startswith("cuda") for group in topology.groups for rank in group.ranks):
        return topology
    numbers = _numbers(topology, num_gpus)
    placed = tuple(
        replace(group, ranks=tuple(_numbered(rank, group, numbers, num_gpus) for rank in group.ranks))
        for group in topology.groups
    )
    users = Counter(rank.device for group in placed for rank in group.ranks)
    groups = tuple(
        replace(group, ranks=tuple(_with_share(rank, group, users, config, has_daemon) for rank in group.ranks))
        for group in placed
    )
    return replace(topology, groups=groups)


def with_a_gpu(
    group: WorkerGroup, present: Sequence[WorkerGroup], config: ClusterConfig, num_gpus: int, *, has_daemon: bool,
    has_mps: bool,
) -> WorkerGroup:  # fmt: skip
    """A worker that joins `present`, on the GPU whose memory is claimed least; where the configuration gives a number,
    there. It takes the part of the memory that `group`, one like those of its pool, has.

    `has_mps`: a daemon runs, whose ever. Raises `ConfigError` if those who are there have claimed too much.
    """
    pool = config.pool(group.role)
    if not pool.engine.device.startswith("cuda"):
        return group
    claimed: dict[str, float] = {f"cuda:{number}": 0.0 for number in range(num_gpus)}
    users: Counter[str] = Counter()
    for other in present:
        for rank in other.ranks:
            if rank.device.startswith("cuda"):
                claimed[rank.device] = claimed.get(rank.device, 0.0) + _claim(rank, config.pool(other.role))
                users[rank.device] += 1
    ranks = []
    for rank in group.ranks:
        device = pool.engine.device
        if device == "cuda":
            device = min(claimed, key=lambda each: (claimed[each], users[each]))
        claimed[device] += _claim(rank, pool)
        users[device] += 1
        if claimed[device] > DEFAULT_GPU_FRACTION + 0.01:
            raise ConfigError(
                f"{group.name} would share {device}, and the workers there have claimed its memory: drain one first, "
                "or launch with engine.gpu_memory_fraction set in both pools, for as many workers as there will be"
            )
        percent = _percent(pool, group.role, is_shared=users[device] > 1 and has_mps, has_daemon=has_daemon)
        ranks.append(replace(rank, device=device, gpu_percent=percent))
    return replace(group, ranks=tuple(ranks))


def _claim(rank: Rank, pool: PoolSettings) -> float:
    """Part of a GPU's memory; nothing is known of a worker whose pool's bytes are set."""
    if pool.engine.kv_cache_bytes is not None:
        return 0.0
    return pool.engine.gpu_memory_fraction or DEFAULT_GPU_FRACTION / rank.num_sharers


def without_shares(topology: Topology) -> Topology:
    """Where no MPS daemon could be started: who is told of a share would do without the library for nothing."""
    groups = tuple(
        replace(group, ranks=tuple(replace(rank, gpu_percent=None) for rank in group.ranks))
        for group in topology.groups
    )
    return replace(topology, groups=groups)


def shared_gpus(topology: Topology) -> frozenset[str]:
    """Devices that several ranks compute on."""
    users = Counter(rank.device for group in topology.groups for rank in group.ranks if rank.device.startswith("cuda"))
    return frozenset(device for device, count in users.items() if count > 1)


def shares_without_effect(topology: Topology, config: ClusterConfig) -> list[str]:
    """For the user to read: each worker whose pool was given a share that it does not have."""
    found = []
    for group in topology.groups:
        percent = config.pool(group.role).gpu_percent
        told = f"{group.role.value}.gpu_percent: {percent} has no effect on {group.name}"
        device = group.ranks[0].device
        if percent is None:
            continue
        if not device.startswith("cuda"):
            found.append(f"{told}, which computes on {device}; leave it out")
        elif group.ranks[0].gpu_percent is None:
            found.append(
                f"{told}, which has {device} to itself; leave it out, or start MPS yourself and set "
                "CUDA_MPS_PIPE_DIRECTORY"
            )
    return found


def shares_of_others(config: ClusterConfig) -> list[str]:
    """For the user to read, where an outer launcher or Ray places the workers."""
    pools = {"prefill": config.prefill, "decode": config.decode}
    return [
        f"{name}.gpu_percent: {pool.gpu_percent} has no effect, GPUs are shared by whoever places the workers; set "
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE there"
        for name, pool in pools.items()
        if pool.gpu_percent is not None
    ]


def _numbers(topology: Topology, num_gpus: int) -> Iterator[int]:
    """One for each rank whose device has none. A number that no GPU has is refused by who takes it."""
    users = Counter(rank.device for group in topology.groups for rank in group.ranks)
    for _ in range(users["cuda"]):
        number = fewest_users(users, max(num_gpus, 1))
        users[f"cuda:{number}"] += 1
        yield number


def _numbered(rank: Rank, group: WorkerGroup, numbers: Iterator[int], num_gpus: int) -> Rank:
    if not rank.device.startswith("cuda"):
        return rank
    device = f"cuda:{next(numbers)}" if rank.device == "cuda" else rank.device
    number = device.partition(":")[2]
    if not number.isdecimal() or int(number) >= num_gpus:
        raise ConfigError(
            f"{group.role.value}.engine.device: {rank.device!r} was asked for, and this machine has {num_gpus} GPUs; "
            "use `cpu`, or a smaller number"
        )
    return replace(rank, device=device)


def _with_share(rank: Rank, group: WorkerGroup, users: Counter[str], config: ClusterConfig, has_daemon: bool) -> Rank:
    pool = config.pool(group.role)
    num_users = users[rank.device]
    is_shared = num_users > 1 and rank.device.startswith("cuda")
    percent = _percent(pool, group.role, is_shared=is_shared, has_daemon=has_daemon)
    return replace(rank, gpu_percent=percent, num_sharers=num_users if is_shared else rank.num_sharers)


def _percent(pool: PoolSettings, role: Role, *, is_shared: bool, has_daemon: bool) -> int | None:
    if is_shared:
        return pool.gpu_percent or DEFAULT_PERCENT[role]
    return pool.gpu_percent if has_daemon else None
