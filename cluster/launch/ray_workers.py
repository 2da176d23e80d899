"""What the groups of a deployment are when Ray has placed them: their addresses, configs and files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cluster.addresses import WILDCARDS, is_loopback, join_address
from cluster.config import ClusterConfig
from cluster.launch.pools import Members
from cluster.launch.ray_cluster import RayCluster
from cluster.launch.ray_group import Files, RayGroup
from cluster.launch.ray_messages import Order, Place, encode
from cluster.launch.ray_plan import placement_request, router_request, spans_nodes
from cluster.launch.specs import (
    ROUTER_STOPS_FIRST,
    WORKERS_STOP_LAST,
    following_members,
    process_environment,
    router_config,
    worker_config,
)
from cluster.launch.topology import Topology, WorkerGroup
from cluster.launch.view import Serving
from cluster.model_files.demo import DEMO_NAME
from cluster.model_files.source import ModelSource

KEY_NAME = "cluster.key"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What every process of one launch is made from."""

    config: ClusterConfig
    model: ModelSource
    model_name: str
    key_file: Path
    members: Members

    @property
    def model_reference(self) -> str:
        """How another node finds the model: it fetches the same revision, or has the same path."""
        if not spans_nodes(self.config):
            return str(self.model.path.absolute())
        if self.config.model.path == DEMO_NAME:
            return DEMO_NAME
        if self.model.revision:
            return f"{self.model.name}@{self.model.revision}"
        return str(self.model.path.absolute())


class RayWorker(RayGroup):
    """A `PoolWorker`."""

    def __init__(self, cluster: RayCluster, blueprint: Blueprint, group: WorkerGroup) -> None:
        config = blueprint.config
        request = placement_request(config, group)
        super().__init__(cluster, request, stop_order=WORKERS_STOP_LAST, only_here=not spans_nodes(config))
        self._blueprint = blueprint
        self._planned = group
        self._listen_host = group.host
        self.group = group  # with host and port from the first `prepare` on

    @property
    def process(self) -> RayWorker:
        return self

    async def _settle(self, places: Sequence[Place]) -> None:
        place = places[0]
        if self._only_here:
            host = self._listen_host = self._planned.host
        else:
            host = place.host
            self._listen_host = self._planned.host if self._planned.host in WILDCARDS else host
        port = self.group.port if self._has_stayed(places) else self._planned.port
        port = port or await self._ranks[0].call("choose_port", self._listen_host)
        self.group = replace(self._planned, host=host, port=port)
        self._blueprint.members.join(self.group)

    def _order(self, rank: int, place: Place) -> Order:
        plan = self._blueprint
        files: Files = {}
        key_file = str(plan.key_file)
        if plan.config.launch.ray.send_cluster_key:
            key_file = f"{place.directory}/{KEY_NAME}"
            files[KEY_NAME] = plan.key_file.read_bytes()
        config = worker_config(plan.config, self.group, plan.model, plan.model_name, plan.key_file)
        config = msgspec.structs.replace(
            config, model=plan.model_reference, host=self._listen_host, cluster_key_file=key_file
        )
        if self._listen_host != self.group.host:
            config = msgspec.structs.replace(config, advertised_host=self.group.host)
        files[f"{self.name}.json"] = encode(config)
        command = (self.group.role.value, "--config", f"{place.directory}/{self.name}.json")
        return Order(self.name, command, process_environment(self.group), files)


class RayRouter(RayGroup):
    """The router where Ray has put it. The files of its workers are copied to it."""

    def __init__(self, cluster: RayCluster, blueprint: Blueprint, topology: Topology, serving: Serving) -> None:
        request, only_here = router_request(blueprint.config), not spans_nodes(blueprint.config)
        super().__init__(cluster, request, stop_order=ROUTER_STOPS_FIRST, only_here=only_here)
        self._blueprint = blueprint
        self._topology = topology
        self._serving = serving
        self._port = topology.router.port

    async def _settle(self, places: Sequence[Place]) -> None:
        router = self._topology.router
        if not self._has_stayed(places):
            self._port = router.port or await self._ranks[0].call("choose_port", router.host)
        host = router.host if is_loopback(router.host) else places[0].host
        self._serving.url = f"http://{join_address(host, self._port)}"

    def _order(self, rank: int, place: Place) -> Order:
        plan = self._blueprint
        config = router_config(plan.config, self._topology, plan.model, plan.model_name)
        config = following_members(config, Path(place.directory))
        config = msgspec.structs.replace(config, model_path=plan.model_reference, port=self._port)
        files = {**plan.members.files(), "router.json": encode(config)}
        return Order(self.name, ("cluster.router", "--config", f"{place.directory}/router.json"), {}, files)

    def _followed_files(self) -> AsyncIterator[Files]:
        return self._blueprint.members.changes()
