"""A topology as a table for people."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.launch.external_parts import describe_parts, parts_of
from cluster.launch.topology import Topology, join_address


def topology_table(topology: Topology, config: ClusterConfig) -> Group:
    table = Table(title=f"{config.model.reference}: {topology.summary}", title_justify="left")
    for column in ("rank", "process", "role", "listens on", "device", "threads"):
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
        rank, where = part.group.ranks[part.group_rank], _where(part.group.host, part.group.port)
        role = part.group.role.value
        table.add_row(str(part.rank), part.name, role, where, rank.device, str(rank.num_threads))
    moves = (
        f"KV moves over {config.connector.transport}, leases of {config.connector.lease_s:g} s, "
        f"on failure: {config.connector.on_failure}."
    )
    ranks = (
        f"Under torchrun, srun, mpirun or as a LeaderWorkerSet: {topology.num_processes} ranks "
        f"({describe_parts(topology)})."
    )
    return Group(table, Text(moves), Text(ranks))


def _where(host: str, port: int) -> str:
    return join_address(host, port) if port else f"{host}, a free port"
