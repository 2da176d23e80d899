"""The workers a router knows: their connections, what is in flight there, who refused whom.

A connection reconnects by itself; the pool only asks who is ready. It owns the connections it is given
and closes them.

    join -> placed while ready -> retire -> no new work, running requests finish -> close_retired
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from cluster.errors import Overloaded
from cluster.router.placement import Candidate, choose_pair
from cluster.rpc.base import WorkerConnection
from cluster.types import Role, WorkerInfo

MAX_REMEMBERED_MISMATCHES = 4096
POLL_S = 0.05


class Worker:
    """One connection and this router's own counts of what runs there and who may still need the connection."""

    def __init__(self, connection: WorkerConnection, name: str) -> None:
        self.connection = connection
        self.name = name  # "decode-0": the label `engine` in /metrics
        self.num_in_flight = 0
        self._num_users = 0

    @property
    def engine_id(self) -> str:
        info = self.connection.info
        return "" if info is None else info.engine_id

    def candidate(self) -> Candidate:
        return Candidate(
            address=self.connection.address,
            engine_id=self.engine_id,
            # What was placed here and is still computed by a prefill worker will come: in a burst, all of it together.
            num_in_flight=max(self.num_in_flight, self.connection.num_promised),
            load=self.connection.load,
        )

    @property
    def is_unused(self) -> bool:
        return not self._num_users and not self.connection.num_promised

    @contextmanager
    def used(self) -> Iterator[WorkerConnection]:
        """Until this is left, the connection stays: it may have more to say, such as a release."""
        self._num_users += 1
        try:
            yield self.connection
        finally:
            self._num_users -= 1

    @contextmanager
    def counted(self) -> Iterator[WorkerConnection]:
        """While it computes."""
        with self.used() as connection:
            self.num_in_flight += 1
            try:
                yield connection
            finally:
                self.num_in_flight -= 1


class WorkerPair:
    """Where one attempt runs. `prefill` is None when the decode worker computes the prompt itself."""

    def __init__(self, prefill: Worker | None, decode: Worker) -> None:
        self.prefill = prefill
        self.decode = decode
        # of the processes that were chosen: a worker that restarts meanwhile has another id
        self.engine_ids = ("" if prefill is None else prefill.engine_id, decode.engine_id)


class WorkerPool:
    def __init__(self, *, prefill: Sequence[WorkerConnection] | None, decode: Sequence[WorkerConnection]) -> None:
        """`prefill` None: there is no prefill pool."""
        assert all(connection.role is Role.DECODE for connection in decode)
        assert all(connection.role is Role.PREFILL for connection in prefill or ())
        self.decode = _named("decode", decode)
        self.prefill = None if prefill is None else _named("prefill", prefill)
        self._retired: list[Worker] = []
        self._mismatched: dict[tuple[str, str], None] = {}  # in order of age

    @property
    def workers(self) -> list[Worker]:
        """Those that leave but still have requests included."""
        return [*self._members, *self._retired]

    @property
    def _members(self) -> list[Worker]:
        return [*(self.prefill or ()), *self.decode]

    def addresses(self, role: Role) -> frozenset[str]:
        return frozenset(worker.connection.address for worker in self._of(role))

    def join(self, connection: WorkerConnection, name: str = "") -> None:
        """One more worker, which the pool owns from now on. `name`: what whoever started it calls it; without, or while
        another one has it, the first number that is free."""
        taken = {worker.name for worker in self.workers}
        role = connection.role
        if not name or name in taken:
            name = next(name for index in itertools.count() if (name := f"{role.value}-{index}") not in taken)
        self._of(role).append(Worker(connection, name))

    def retire(self, role: Role, address: str) -> None:
        """Give it no new requests; it is closed when those it has are done."""
        workers = self._of(role)
        self._retired += [worker for worker in workers if worker.connection.address == address]
        workers[:] = [worker for worker in workers if worker.connection.address != address]

    def take_back(self, role: Role, address: str) -> bool:
        """Undo `retire` if the worker is still there."""
        returning = [
            worker
            for worker in self._retired
            if worker.connection.address == address and worker.connection.role is role
        ]
        self._retired = [worker for worker in self._retired if worker not in returning]
        self._of(role).extend(returning)
        return bool(returning)

    async def close_retired(self) -> None:
        idle = [worker for worker in self._retired if worker.is_unused]
        self._retired = [worker for worker in self._retired if worker not in idle]
        await asyncio.gather(*(worker.connection.close() for worker in idle))

    def _of(self, role: Role) -> list[Worker]:
        if role is Role.DECODE:
            return self.decode
        assert self.prefill is not None, "this router has no prefill pool"
        return self.prefill

    @property
    def is_ready(self) -> bool:
        """Something could be placed: every configured pool has a ready worker."""
        return _any_ready(self.decode) and (self.prefill is None or _any_ready(self.prefill))

    def why_not_ready(self) -> str:
        """For operators: every address, and what is wrong with it."""
        return ", ".join(
            f"no {role.value} worker is ready ({'; '.join(map(_state, workers)) or 'none is configured'})"
            for role, workers in self._without_ready()
        )

    def what_is_missing(self) -> str:
        """For clients, who learn nothing of our insides."""
        missing = self._without_ready()
        return ", ".join(f"no {role.value} worker is ready (of {len(workers)})" for role, workers in missing)

    def _without_ready(self) -> list[tuple[Role, list[Worker]]]:
        pools = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode))
        return [(role, workers) for role, workers in pools if workers is not None and not _any_ready(workers)]

    def limits(self) -> WorkerInfo:
        """Of the worker with the shortest context among those ready. Raises `Overloaded`."""
        infos = [
            worker.connection.info
            for worker in self._members
            if worker.connection.is_ready and worker.connection.info is not None
        ]
        if not infos or not self.is_ready:
            raise Overloaded(self.what_is_missing() or "no worker has introduced itself yet")
        return min(infos, key=lambda info: info.max_model_len)

    def place(self, *, affinity: bytes, avoid: Collection[str]) -> WorkerPair | None:
        decode = {worker.connection.address: worker for worker in self.decode if worker.connection.is_ready}
        prefill = {worker.connection.address: worker for worker in self.prefill or () if worker.connection.is_ready}
        pair = choose_pair(
            None if self.prefill is None else [worker.candidate() for worker in prefill.values()],
            [worker.candidate() for worker in decode.values()],
            affinity=affinity,
            avoid=avoid,
            mismatched=self._mismatched,
        )
        if pair is None:
            return None
        return WorkerPair(prefill[pair.prefill.address] if pair.prefill else None, decode[pair.decode.address])

    async def wait_for_place(self, *, affinity: bytes, avoid: Collection[str], timeout_s: float) -> WorkerPair | None:
        """As `place`, but gives workers that reconnect or restart `timeout_s` to come back."""
        give_up_at = asyncio.get_running_loop().time() + timeout_s
        while (pair := self.place(affinity=affinity, avoid=avoid)) is None:
            if asyncio.get_running_loop().time() >= give_up_at:
                return None
            await asyncio.sleep(POLL_S)
        return pair

    def remember_mismatch(self, engine_ids: tuple[str, str]) -> None:
        """These processes do not fit. A restart of either gives it a new id and with it a new chance."""
        self._mismatched[engine_ids] = None
        while len(self._mismatched) > MAX_REMEMBERED_MISMATCHES:
            del self._mismatched[next(iter(self._mismatched))]

    async def close(self) -> None:
        await asyncio.gather(*(worker.connection.close() for worker in self.workers))


def _named(role: str, connections: Sequence[WorkerConnection]) -> list[Worker]:
    return [Worker(connection, f"{role}-{index}") for index, connection in enumerate(connections)]


def _any_ready(workers: Sequence[Worker]) -> bool:
    return any(worker.connection.is_ready for worker in workers)


def _state(worker: Worker) -> str:
    reason = worker.connection.last_error
    return f"{worker.connection.address}: {reason}" if reason else f"{worker.connection.address}: draining"
