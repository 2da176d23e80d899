"""A topology as a table for people."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.launch.ray_plan import placement_request, spans_nodes
from cluster.launch.topology import Topology, join_address


def topology_table(topology: Topology, config: ClusterConfig) -> Group:
    table = Table(title=f"{config.model.reference}: {topology.summary}", title_justify="left")
    is_ray = config.launch.backend == "ray"
    for column in ("process", "role", "listens on", "device", "threads", *(["Ray is asked for"] if is_ray else [])):
        table.add_column(column, justify="right" if column == "threads" else "left")
    front = _where(topology.router.host, topology.router.port)
    if topology.is_monolithic:
        rank = topology.groups[0].ranks[0]
        table.add_row("monolithic", "router and engine", front, rank.device, str(rank.num_threads))
        return Group(table)
    table.add_row("router", "HTTP", front, "", "")
    for group in topology.groups:
        host = "its node" if is_ray and spans_nodes(config) else group.host
        needs = [str(placement_request(config, group))] if is_ray else []
        for rank in group.ranks:
            cells = (group.name, group.role.value, _where(host, group.port), rank.device, str(rank.num_threads))
            table.add_row(*cells, *needs)
    moves = (
        f"KV moves over {config.connector.transport}, leases of {config.connector.lease_s:g} s, "
        f"on failure: {config.connector.on_failure}."
    )
    return Group(table, Text(moves))


def _where(host: str, port: int) -> str:
    return join_address(host, port) if port else f"{host}, a free port"
