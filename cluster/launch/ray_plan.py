"""What Ray is asked for, so that the groups of a topology can run. Pure: no sockets, no clock, no files, no Ray.

One placement group per worker group:

    one stage        a bundle per rank, STRICT_PACK: all ranks on one node
    several stages   a bundle per stage, PACK: the ranks of a stage on one node, the stages on few nodes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.addresses import WILDCARDS, is_loopback
from cluster.config import ClusterConfig, PoolSettings
from cluster.errors import ConfigError
from cluster.launch.topology import WorkerGroup
from cluster.types import Role

Resources = Mapping[str, float]  # "CPU": 2.0, "GPU": 1.0


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """One placement group."""

    name: str
    strategy: Literal["STRICT_PACK", "PACK"]
    bundles: tuple[Resources, ...]
    bundle_of_rank: tuple[int, ...]
    per_rank: Resources
    labels: Mapping[str, str]  # that a node must have

    def __str__(self) -> str:
        """`1 bundle of CPU 2, GPU 1 (STRICT_PACK)`."""
        bundles = f"{len(self.bundles)} bundle{'s' if len(self.bundles) > 1 else ''}"
        labels = "".join(f", {name}={value}" for name, value in sorted(self.labels.items()))
        return f"{bundles} of {shown(self.bundles[0])} ({self.strategy}){labels}"


def shown(resources: Resources) -> str:
    """`CPU 2, GPU 1`."""
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(resources.items())) or "nothing"


def placement_request(config: ClusterConfig, group: WorkerGroup) -> PlacementRequest:
    """What `group` needs: of ranks that share nothing, as many times what one needs."""
    pool = config.pool(group.role)
    ray = config.launch.ray
    per_rank = {"CPU": float(ray.cpus_per_rank or pool.engine.num_threads or 1)}
    if _is_cuda(pool):
        per_rank["GPU"] = ray.gpus_per_rank
    stages = sorted({rank.stage for rank in group.ranks})
    if len(stages) == 1:
        bundles = tuple(per_rank for _ in group.ranks)
        bundle_of_rank = tuple(range(len(group.ranks)))
    else:
        bundle_of_rank = tuple(stages.index(rank.stage) for rank in group.ranks)
        sizes = [bundle_of_rank.count(index) for index in range(len(stages))]
        bundles = tuple({name: amount * size for name, amount in per_rank.items()} for size in sizes)
    return PlacementRequest(
        name=group.name,
        strategy="STRICT_PACK" if len(stages) == 1 else "PACK",
        bundles=bundles,
        bundle_of_rank=bundle_of_rank,
        per_rank=per_rank,
        labels=ray.prefill_labels if group.role is Role.PREFILL else ray.decode_labels,
    )


def router_request(config: ClusterConfig) -> PlacementRequest:
    """The router as an actor: it computes nothing, a core is enough."""
    cpu = {"CPU": 1.0}
    return PlacementRequest("router", "STRICT_PACK", (cpu,), (0,), cpu, config.launch.ray.router_labels)


def spans_nodes(config: ClusterConfig) -> bool:
    """Whether workers may be placed on other nodes than the launcher's: only with consent to plaintext."""
    return config.security.allow_plaintext_network


def check_ray(config: ClusterConfig) -> None:
    """Raises `ConfigError` naming every key that cannot be had with `launch.backend: ray`."""
    if problems := list(_problems(config)):
        raise ConfigError("\n".join(problems))


def _problems(config: ClusterConfig) -> Iterator[str]:
    if config.monolithic:
        yield "launch.backend: ray places pools of workers, `monolithic: true` is one process; remove one of the two"
    for role in Role:
        yield from _pool_problems(config, role)
    is_shared = config.security.cluster_key_file is not None or config.launch.ray.send_cluster_key
    if spans_nodes(config) and not is_shared:
        yield (
            "security.cluster_key_file: workers may be placed on other nodes, which cannot read a key that is made "
            "here; name a file that every node has, or let Ray carry it with `launch.ray.send_cluster_key: true`"
        )
    if config.launch.ray.router == "actor" and spans_nodes(config) and config.router.host not in WILDCARDS:
        yield (
            f"router.host: {config.router.host} cannot be reached from outside if Ray puts the router on another "
            "node; with `launch.ray.router: actor` set 0.0.0.0, or leave the router beside the launcher"
        )


def _pool_problems(config: ClusterConfig, role: Role) -> Iterator[str]:
    name, pool = role.value, config.pool(role)
    if not is_loopback(pool.host) and pool.host not in WILDCARDS:
        yield (
            f"{name}.host: {pool.host} is an address of one machine, and Ray chooses the nodes; leave it out (each "
            "worker listens on its node's address), or set 0.0.0.0"
        )
    if not _is_cuda(pool):
        return
    if pool.engine.device not in ("cuda", "cuda:0"):
        yield f"{name}.engine.device: Ray gives each rank its own GPU, so {pool.engine.device} is not there; set cuda"
    if config.launch.ray.gpus_per_rank < 1 and pool.engine.kv_cache_bytes is None:
        yield (
            f"{name}.engine.kv_cache_bytes: must be set with launch.ray.gpus_per_rank "
            f"{config.launch.ray.gpus_per_rank:g}: ranks that share a GPU would each take all of its memory"
        )


def _is_cuda(pool: PoolSettings) -> bool:
    return pool.engine.device.partition(":")[0] == "cuda"
