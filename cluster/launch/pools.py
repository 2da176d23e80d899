"""The worker pools of a local launch while it runs: status, drain, scale.

    up:    choose a port, write the config, start, wait until ready, tell the router
    down:  tell the router, give it time to read that, SIGTERM (the worker finishes what it has), forget it

One change at a time; a change that fails leaves the pools as they are and says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig, PoolSettings
from cluster.errors import ConfigError, Overloaded, TandemError, WorkerLost
from cluster.launch.control_messages import (
    Answer,
    Command,
    Deployment,
    Doing,
    Done,
    Drain,
    Refused,
    Scale,
    Status,
    WorkerStatus,
)
from cluster.launch.local import LocalLauncher
from cluster.launch.ports import choose_free_port
from cluster.launch.specs import worker_spec, write_members
from cluster.launch.topology import Topology, WorkerGroup, next_group, with_port
from cluster.model_files.source import ModelSource
from cluster.types import Role

ROUTER_READS_S = 0.5  # a router looks at its members file every 0.2 s
QUESTION_TIMEOUT_S = 2.0
MAX_REPLICAS = 64  # of one role on one machine


class LocalPools:
    """Everything that is needed to start one more worker like those there are."""

    def __init__(
        self,
        launcher: LocalLauncher,
        config: ClusterConfig,
        topology: Topology,
        model: ModelSource,
        model_name: str,
        directory: Path,
        key_file: Path,
    ) -> None:
        self._launcher = launcher
        self._config = config
        self._topology = topology
        self._model = model
        self._model_name = model_name
        self._directory = directory
        self._key_file = key_file
        self._groups = list(topology.groups)
        self._change = asyncio.Lock()

    async def handle(self, command: Command) -> AsyncIterator[Answer]:
        """What to answer, the last one ends it. Errors of ours are answers."""
        try:
            match command:
                case Status():
                    yield await self.status()
                case Drain(worker):
                    async for answer in self._exclusively(self._drain_one(worker)):
                        yield answer
                case Scale(replicas):
                    async for answer in self._exclusively(self._scale(replicas)):
                        yield answer
        except TandemError as error:
            yield Refused(error.message)

    async def status(self) -> Deployment:
        workers = await asyncio.gather(*(self._status_of(group) for group in self._groups))
        return Deployment(self._topology.router.url, self._model_name, tuple(workers))

    async def _exclusively(self, change: AsyncIterator[Answer]) -> AsyncIterator[Answer]:
        if self._topology.is_monolithic:
            raise ConfigError("a monolithic deployment is one process: there are no pools to change")
        if not self._launcher.is_serving:
            raise Overloaded("the deployment is still starting")
        if self._change.locked():
            raise Overloaded("another change is under way, try again when it is done")
        async with self._change:
            async for answer in change:
                yield answer

    async def _drain_one(self, name: str) -> AsyncIterator[Answer]:
        found = [group for group in self._groups if group.name == name]
        if not found:
            raise ConfigError(f"there is no worker {name}, only {', '.join(group.name for group in self._groups)}")
        if len(self._of(found[0].role)) == 1:
            role = found[0].role.value
            raise ConfigError(f"{name} is the only {role} worker: `cluster scale {role}=2` first, then drain it")
        yield Doing(f"draining {name}")
        yield Done(await self._leave(found[0]))

    async def _scale(self, replicas: dict[Role, int]) -> AsyncIterator[Answer]:
        for role, count in replicas.items():
            if not 1 <= count <= MAX_REPLICAS:
                raise ConfigError(f"{role.value}={count}: expected 1 to {MAX_REPLICAS} workers")
        for role, count in replicas.items():
            while len(self._of(role)) < count:
                group = self._plan_one(role)
                yield Doing(f"starting {group.name}")
                await self._join(group)
                yield Doing(f"{group.name} is ready")
            while len(self._of(role)) > count:
                group = self._of(role)[-1]
                yield Doing(f"draining {group.name}")
                yield Doing(await self._leave(group))
        yield Done(", ".join(f"{role.value}={len(self._of(role))}" for role in Role))

    def _plan_one(self, role: Role) -> WorkerGroup:
        pool: PoolSettings = self._config.prefill if role is Role.PREFILL else self._config.decode
        return with_port(next_group(self._of(role)[0], self._groups, pool.port), choose_free_port)

    async def _join(self, group: WorkerGroup) -> None:
        names = (self._config, group, self._model, self._model_name, self._directory, self._key_file)
        spec = worker_spec(*names)
        try:
            await self._launcher.add(spec)
        except TandemError:
            self._config_file(group).unlink()
            raise
        self._groups.append(group)
        write_members(self._directory, group.role, self._groups)

    async def _leave(self, group: WorkerGroup) -> str:
        rest = [other for other in self._groups if other is not group]
        write_members(self._directory, group.role, rest)
        await asyncio.sleep(ROUTER_READS_S)
        has_finished = await self._launcher.drain(group.name)
        self._groups = rest
        self._config_file(group).unlink()
        return f"{group.name} has left" if has_finished else f"{group.name} was killed, it did not drain in time"

    def _config_file(self, group: WorkerGroup) -> Path:
        return self._directory / f"{group.name}.json"

    def _of(self, role: Role) -> list[WorkerGroup]:
        return [group for group in self._groups if group.role is role]

    async def _status_of(self, group: WorkerGroup) -> WorkerStatus:
        name = "monolithic" if self._topology.is_monolithic else group.name
        state, pid = self._launcher.state_of(name), self._launcher.pid_of(name)
        return await with_load(WorkerStatus(group.name, group.role, group.address, state, pid))


async def with_load(known: WorkerStatus) -> WorkerStatus:
    """`known` and what the worker itself says, if it answers."""
    from cluster.rpc import admin  # gRPC takes long to import, and few launches are asked

    try:
        async with asyncio.timeout(QUESTION_TIMEOUT_S):
            info, load = await admin.get_info(known.address)
    except (WorkerLost, TimeoutError):
        return known
    return msgspec.structs.replace(
        known,
        engine_id=info.engine_id,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
    )
