"""Which part of a topology each rank of an outer launcher runs, and on what. Pure.

    rank 0: the router | the ranks of prefill-0, prefill-1, ... | the ranks of decode-0, decode-1, ...

The ranks of one group are neighbours, so that launchers which fill one host after the other keep them together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from cluster.addresses import WILDCARDS
from cluster.config import ClusterConfig, PoolSettings
from cluster.errors import ConfigError
from cluster.launch.topology import Rank, Topology, WorkerGroup, fewest_users
from cluster.types import Role

MAX_REPLICAS = 64
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank runs: the router (`group` None), or a rank of a worker group."""

    rank: int
    name: str  # "router", "prefill-0"; "prefill-0.1" is the second rank of a group of several
    group: WorkerGroup | None = None
    group_rank: int = 0


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one rank runs, as rank 0 knows it. `address`: of its host as seen from rank 0, empty for rank 0's own."""

    host: str  # for people
    address: str
    num_cores: int
    cpus: frozenset[int]  # that it may use: a launcher may have given each rank its own
    num_gpus: int
    advertised_host: str = ""  # said by the rank itself


@dataclass(frozen=True, slots=True)
class Placement:
    """A group with the devices and threads of its ranks, and the host under which others reach it."""

    group: WorkerGroup
    reachable_host: str

    @property
    def reachable(self) -> WorkerGroup:
        """As the router is to see it."""
        return replace(self.group, host=self.reachable_host)


def parts_of(topology: Topology) -> tuple[Part, ...]:
    """One for each rank, in their order."""
    if topology.is_monolithic:
        return (Part(rank=0, name="monolithic"),)
    parts = [Part(rank=0, name="router")]
    for group in topology.groups:
        for index in range(len(group.ranks)):
            name = group.name if len(group.ranks) == 1 else f"{group.name}.{index}"
            parts.append(Part(rank=len(parts), name=name, group=group, group_rank=index))
    return tuple(parts)


def describe_parts(topology: Topology) -> str:
    """`rank 0 router, ranks 1-2 prefill, rank 3 decode`."""
    if topology.is_monolithic:
        return "rank 0 router and engine"
    spans = ["rank 0 router"]
    for role in (Role.PREFILL, Role.DECODE):
        ranks = [part.rank for part in parts_of(topology) if part.group is not None and part.group.role is role]
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        spans.append(f"{span} {role.value}")
    return ", ".join(spans)


def check_world(topology: Topology, config: ClusterConfig, world_size: int, starter: str) -> None:
    """Raise `ConfigError`, with the numbers and what would fit, unless there is one rank for each part."""
    expected = topology.num_processes
    if world_size == expected:
        return
    raise ConfigError(
        f"{starter} started {_ranks(world_size)}, but this configuration means {_ranks(expected)} "
        f"({describe_parts(topology)}). Start {expected}, or choose what fits {world_size}: "
        f"{_what_fits(topology, config, world_size)}. If this launch is not meant to be a part of that job, use "
        "--external none"
    )


def check_hosts(seats: Sequence[Seat], config: ClusterConfig) -> None:
    """Raise `ConfigError` unless workers on several hosts can reach each other and have one key."""
    if len({seat.address for seat in seats}) == 1:
        return
    hosts = sorted({f"{seat.host} at {seat.address}" if seat.address else seat.host for seat in seats})
    problems = [
        f"{name}.host: {pool.host} cannot be listened on by workers on several hosts; use 0.0.0.0"
        for name, pool in (("prefill", config.prefill), ("decode", config.decode))
        if pool.host not in WILDCARDS
    ]
    if not config.security.cluster_key_file and not config.security.send_key_over_network:
        problems.append(
            "security.cluster_key_file: workers on several hosts need one key; name a file that each host has (mode "
            "0600), or let rank 0 send a new key in plain text with `security.send_key_over_network: true`"
        )
    if problems:
        raise ConfigError("\n".join([f"the ranks are on {len(hosts)} hosts ({', '.join(hosts)}):", *problems]))


def place(
    topology: Topology, config: ClusterConfig, seats: Sequence[Seat], leader_address: str
) -> Mapping[str, Placement]:
    """By the groups' names. `seats` in the order of ranks; `leader_address`: of rank 0's host as the other hosts
    see it, empty if there are none.

    The ranks of a host share its cores and its GPUs: `cuda` without a number is dealt out one GPU each, in
    turn, those first that no rank was given by number. Cores are shared by those ranks that may use the same ones.
    """
    parts = parts_of(topology)
    workers = [(part, seats[part.rank]) for part in parts if part.group is not None]
    ranks: dict[str, list[Rank]] = {group.name: [] for group in topology.groups}
    hosts: dict[str, str] = {}
    users: dict[str, Counter[str]] = defaultdict(Counter)  # of each host, by device
    for part, seat in workers:
        users[seat.address][_pool(part, config).engine.device] += 1
    for part, seat in workers:
        group, pool = part.group, _pool(part, config)
        assert group is not None
        device = pool.engine.device
        if device == "cuda" and seat.num_gpus:
            device = f"cuda:{fewest_users(users[seat.address], seat.num_gpus)}"
            users[seat.address][device] += 1
        threads = pool.engine.num_threads or _threads(part, seat, workers, config)
        ranks[group.name].append(replace(group.ranks[part.group_rank], device=device, num_threads=threads))
        own_host = LOOPBACK if group.host in WILDCARDS else group.host
        hosts.setdefault(group.name, seat.advertised_host or seat.address or leader_address or own_host)
    return {
        group.name: Placement(replace(group, ranks=tuple(ranks[group.name])), hosts[group.name])
        for group in topology.groups
    }


def _pool(part: Part, config: ClusterConfig) -> PoolSettings:
    assert part.group is not None
    return config.pool(part.group.role)


def _threads(part: Part, seat: Seat, workers: Sequence[tuple[Part, Seat]], config: ClusterConfig) -> int:
    """A share of the cores, by the rule of `launch.cpu_threads` (`topology.plan_topology`)."""
    assert part.group is not None
    sharers = [
        other
        for other, other_seat in workers
        if other.group is not None
        and other_seat.address == seat.address
        and other_seat.cpus & seat.cpus
        and (config.launch.cpu_threads == "split" or other.group.role is part.group.role)
    ]
    return max(1, seat.num_cores // max(1, len(sharers)))


def _what_fits(topology: Topology, config: ClusterConfig, world_size: int) -> str:
    if world_size == 1:
        return "--monolithic"
    sizes = {role: _ranks_per_group(topology, role) for role in Role}
    fitting = list(_fitting_replicas(world_size - 1, sizes[Role.PREFILL], sizes[Role.DECODE]))
    if not fitting:
        smallest = 1 + sum(sizes.values())
        return f"nothing does: one prefill and one decode worker take {smallest} ranks, --monolithic takes 1"
    wanted = config.prefill.replicas / (config.prefill.replicas + config.decode.replicas)
    prefill, decode = min(fitting, key=lambda pair: abs(pair[0] / sum(pair) - wanted))
    return f"--prefill {prefill} --decode {decode}"


def _fitting_replicas(num_ranks: int, per_prefill: int, per_decode: int) -> Iterator[tuple[int, int]]:
    for prefill in range(1, MAX_REPLICAS + 1):
        rest = num_ranks - prefill * per_prefill
        decode, left_over = divmod(rest, per_decode)
        if 1 <= decode <= MAX_REPLICAS and left_over == 0:
            yield prefill, decode


def _ranks_per_group(topology: Topology, role: Role) -> int:
    """A monolithic topology has no prefill group; one like its decode group would be added."""
    groups = topology.of_role(role) or topology.groups
    return len(groups[0].ranks)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def config_differences(ours: ClusterConfig, theirs: ClusterConfig) -> list[str]:
    """Keys whose values differ, with both; where a host keeps the key file is its own business."""
    our_values, their_values = dict(_flat(ours)), dict(_flat(theirs))
    return [
        f"{key} is {their_values.get(key)!r} there and {value!r} here"
        for key, value in our_values.items()
        if their_values.get(key) != value and key != "security.cluster_key_file"
    ]


def _flat(section: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in msgspec.structs.asdict(section).items():
        if isinstance(value, msgspec.Struct):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
