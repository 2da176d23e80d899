"""The worker pools of a launch while it runs: status, drain, scale.

    up:    make a worker, start it, wait until it is ready, tell the router
    down:  tell the router, give it time to read that, SIGTERM (the worker finishes what it has), forget it

One change at a time; a change that fails leaves the pools as they are and says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.config import ClusterConfig
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
from cluster.launch.process import Launchable, ProcessSpec
from cluster.launch.specs import members_name, write_members
from cluster.launch.topology import WorkerGroup, next_group
from cluster.launch.view import Serving
from cluster.types import Role

ROUTER_READS_S = 0.5  # a router looks at its members file every 0.2 s
QUESTION_TIMEOUT_S = 2.0
MAX_REPLICAS = 64  # of one role on one machine


class PoolWorker(Protocol):
    """One worker of a pool: where it is reached, and what a launcher keeps alive for it."""

    @property
    def group(self) -> WorkerGroup: ...

    @property
    def process(self) -> Launchable: ...

    async def close(self) -> None:
        """After its last life: undo what was made for it."""
        ...


# Of a group that has a name and ranks, and perhaps a port; and of the groups it joins.
MakeWorker = Callable[[WorkerGroup, Sequence[WorkerGroup]], PoolWorker]


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """A worker process of this machine, whose config file was written by `worker_spec`."""

    group: WorkerGroup
    process: ProcessSpec
    directory: Path

    async def close(self) -> None:
        (self.directory / f"{self.group.name}.json").unlink()


class Members:
    """The workers that the router is told of: it follows their files, which exist. `changes` is for a copy of them."""

    def __init__(self, directory: Path, groups: Iterable[WorkerGroup] = ()) -> None:
        """`groups`: what the files say so far."""
        self._directory = directory
        self._groups = {group.name: group for group in groups}
        self._changed = asyncio.Event()

    def join(self, group: WorkerGroup) -> None:
        """Also one that has moved."""
        self._groups[group.name] = group
        self._write(group.role)

    def leave(self, group: WorkerGroup) -> None:
        if self._groups.pop(group.name, None) is not None:
            self._write(group.role)

    def _write(self, role: Role) -> None:
        write_members(self._directory, role, self._groups.values())
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[dict[str, bytes]]:
        """`files`, now and after each change."""
        while True:
            changed = self._changed
            yield self.files()
            await changed.wait()

    def files(self) -> dict[str, bytes]:
        """Content by name."""
        return {name: (self._directory / name).read_bytes() for name in map(members_name, Role)}


class WorkerPools:
    """What runs, and what is needed to start one more worker like those there are."""

    def __init__(
        self,
        launcher: LocalLauncher,
        config: ClusterConfig,
        serving: Serving,
        workers: Iterable[PoolWorker],
        make_worker: MakeWorker,
        members: Members,
    ) -> None:
        self._launcher = launcher
        self._config = config
        self._serving = serving
        self._workers = list(workers)
        self._make_worker = make_worker
        self._members = members
        self._change = asyncio.Lock()

    async def close(self) -> None:
        """When nothing runs any more."""
        await asyncio.gather(*(worker.close() for worker in self._workers))

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
        workers = await asyncio.gather(*(self._status_of(worker) for worker in self._workers))
        return Deployment(self._serving.url, self._serving.model_name, tuple(workers))

    async def _exclusively(self, change: AsyncIterator[Answer]) -> AsyncIterator[Answer]:
        if self._config.monolithic:
            raise ConfigError("a monolithic deployment is one process: there are no pools to change")
        if not self._launcher.is_serving:
            raise Overloaded("the deployment is still starting")
        if self._change.locked():
            raise Overloaded("another change is under way, try again when it is done")
        async with self._change:
            async for answer in change:
                yield answer

    async def _drain_one(self, name: str) -> AsyncIterator[Answer]:
        found = [worker for worker in self._workers if worker.group.name == name]
        if not found:
            names = ", ".join(worker.group.name for worker in self._workers)
            raise ConfigError(f"there is no worker {name}, only {names}")
        role = found[0].group.role
        others = [worker for worker in self._of(role) if worker is not found[0]]
        if not others:
            raise ConfigError(
                f"{name} is the only {role.value} worker: `cluster scale {role.value}=2` first, then drain it"
            )
        if self._is_ready(found[0]) and not any(map(self._is_ready, others)):
            states = ", ".join(f"{worker.group.name} is {self._state(worker)}" for worker in others)
            raise ConfigError(f"{name} is the only {role.value} worker that is ready ({states}): try again later")
        yield Doing(f"draining {name}")
        has_finished = await self._leave(found[0])
        yield Done(_left(name, has_finished), has_finished)

    async def _scale(self, replicas: dict[Role, int]) -> AsyncIterator[Answer]:
        for role, count in replicas.items():
            if not 1 <= count <= MAX_REPLICAS:
                raise ConfigError(f"{role.value}={count}: expected 1 to {MAX_REPLICAS} workers")
        is_clean = True
        for role, count in replicas.items():
            while len(self._of(role)) < count:
                worker = self._plan_one(role)
                yield Doing(f"starting {worker.group.name}")
                await self._join(worker)
                yield Doing(f"{worker.group.name} is ready")
            while len(self._of(role)) > count:
                worker = min(reversed(self._of(role)), key=self._is_ready)  # who does not serve leaves first
                yield Doing(f"draining {worker.group.name}")
                has_finished = await self._leave(worker)
                is_clean = is_clean and has_finished
                yield Doing(_left(worker.group.name, has_finished))
        yield Done(", ".join(f"{role.value}={len(self._of(role))}" for role in Role), is_clean)

    def _plan_one(self, role: Role) -> PoolWorker:
        like = self._of(role)[0].group
        present = [worker.group for worker in self._workers]
        return self._make_worker(next_group(like, present, self._config.pool(role).port), present)

    async def _join(self, worker: PoolWorker) -> None:
        try:
            await self._launcher.add(worker.process)
        except TandemError:
            self._members.leave(worker.group)
            await worker.close()
            raise
        self._workers.append(worker)
        self._members.join(worker.group)

    async def _leave(self, worker: PoolWorker) -> bool:
        """False: it had to be killed."""
        self._members.leave(worker.group)
        await asyncio.sleep(ROUTER_READS_S)
        has_finished = await self._launcher.drain(worker.process.name)
        self._workers.remove(worker)
        await worker.close()
        return has_finished

    def _state(self, worker: PoolWorker) -> str:
        return self._launcher.state_of(worker.process.name)

    def _is_ready(self, worker: PoolWorker) -> bool:
        return self._state(worker) == "ready"

    def _of(self, role: Role) -> list[PoolWorker]:
        return [worker for worker in self._workers if worker.group.role is role]

    async def _status_of(self, worker: PoolWorker) -> WorkerStatus:
        group, name = worker.group, worker.process.name
        state, pid = self._state(worker), self._launcher.pid_of(name)
        return await with_load(WorkerStatus(group.name, group.role, group.address, state, pid))


def _left(name: str, has_finished: bool) -> str:
    return f"{name} has left" if has_finished else f"{name} was killed, it did not drain in time"


async def with_load(known: WorkerStatus) -> WorkerStatus:
    """`known` and what the worker itself says, if it answers."""
    from cluster.rpc import admin  # gRPC takes long to import, and few launches are asked

    try:
        async with asyncio.timeout(QUESTION_TIMEOUT_S):
            info, load, is_draining = await admin.get_info(known.address)
    except (WorkerLost, TimeoutError):
        is_asked = not known.address.endswith(":0")  # one that shares the router's process has no port
        return msgspec.structs.replace(known, state="silent") if known.state == "ready" and is_asked else known
    return msgspec.structs.replace(
        known,
        state="draining" if is_draining and known.state == "ready" else known.state,
        engine_id=info.engine_id,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
    )
