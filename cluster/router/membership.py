"""Keeps a router's pools in step with what its sources say: join, retire, close when the last request is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from cluster.router.discovery import Source
from cluster.router.pool import WorkerPool
from cluster.rpc.base import WorkerConnection
from cluster.types import Role

log = logging.getLogger(__name__)

REAP_PAUSE_S = 0.2

Connect = Callable[[str, Role], WorkerConnection]


class Membership:
    """Which workers a pool has. `connect` makes a connection, which the pool owns from then on."""

    def __init__(self, pool: WorkerPool, sources: Mapping[Role, Sequence[Source]], connect: Connect) -> None:
        self._pool = pool
        self._sources = sources
        self._connect = connect
        self._told: dict[tuple[Role, int], Mapping[str, str]] = {}  # addresses and their names

    async def follow(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for role, sources in self._sources.items():
                for index, source in enumerate(sources):
                    group.create_task(self._follow_one(role, index, source))
            while True:
                await self._pool.close_retired()
                await asyncio.sleep(REAP_PAUSE_S)

    async def _follow_one(self, role: Role, index: int, source: Source) -> None:
        def on_addresses(addresses: Mapping[str, str]) -> None:
            self._told[role, index] = addresses
            self._apply(role)

        await source.follow(on_addresses)

    def _apply(self, role: Role) -> None:
        wanted: dict[str, str] = {}
        for of, index in sorted(self._told, key=lambda key: key[1]):
            if of is role:
                wanted.update(self._told[of, index])
        present = self._pool.addresses(role)
        for address in sorted(present - wanted.keys()):
            log.info("%s worker %s leaves", role.value, address)
            self._pool.retire(role, address)
        for address, name in wanted.items():
            if address in present:
                continue
            log.info("%s worker %s joins", role.value, address)
            if not self._pool.take_back(role, address):
                self._pool.join(self._connect(address, role), name)
