"""A topology as a table for people."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.addresses import join_address
from cluster.config import ClusterConfig
from cluster.launch.external_parts import describe_parts, parts_of
from cluster.launch.ray_plan import placement_request, spans_nodes
from cluster.launch.topology import Rank, Topology


def topology_table(topology: Topology, config: ClusterConfig) -> Group:
    table = Table(title=f"{config.model.reference}: {topology.summary}", title_justify="left")
    is_ray = config.launch.backend == "ray"
    columns = ("rank", "process", "role", "listens on", "device", "threads", *(["Ray is asked for"] if is_ray else []))
    for column in columns:
        table.add_column(column, justify="right" if column in ("rank", "threads") else "left")
    front = _where(topology.router.host, topology.router.port)
    if topology.is_monolithic:
        rank = topology.groups[0].ranks[0]
        table.add_row("0", "monolithic", "router and engine", front, rank.device, str(rank.num_threads))
        return Group(table)
    for part in parts_of(topology):
        if part.group is None:
            table.add_row(str(part.rank), part.name, "HTTP", front, "", "")
            continue
        rank, host = part.group.ranks[part.group_rank], part.group.host
        where = _where("its node" if is_ray and spans_nodes(config) else host, part.group.port)
        needs = [str(placement_request(config, part.group))] if is_ray else []
        cells = (str(part.rank), part.name, part.group.role.value, where, _device(rank), str(rank.num_threads))
        table.add_row(*cells, *needs)
    moves = (
        f"KV moves over {config.connector.transport}, leases of {config.connector.lease_s:g} s, "
        f"on failure: {config.connector.on_failure}."
    )
    ranks = (
        f"Under torchrun, srun, mpirun or as a LeaderWorkerSet: {topology.num_processes} ranks "
        f"({describe_parts(topology)})."
    )
    return Group(table, Text(moves), Text(ranks))


def _device(rank: Rank) -> str:
    return rank.device if rank.gpu_percent is None else f"{rank.device} ({rank.gpu_percent} %)"


def _where(host: str, port: int) -> str:
    return join_address(host, port) if port else f"{host}, a free port"
