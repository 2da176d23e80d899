"""The ranks of one group, placed by Ray and launched as one (`Launchable`): placement group -> actors -> processes.

    prepare   reserve the group's resources, an actor for each rank, see where they are    (what is there is kept)
    start     a process by each actor; the group is ready when rank 0 is
    end       the first process that ends or is lost ends the others: a group that lost a rank cannot go on

An actor that dies takes its process with it, and all actors of its group are replaced at the next `prepare`.
"""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from cluster.errors import StartupError
from cluster.launch.process import ProcessListener
from cluster.launch.ray_cluster import Placement, RayCluster
from cluster.launch.ray_handle import ACTOR_START_TIMEOUT_S, RETRY_PAUSE_S, RankHandle, RankLost
from cluster.launch.ray_messages import Ended, Logged, NotStarted, Order, Place, Said, Started, encode, start_decoder
from cluster.launch.ray_plan import PlacementRequest
from cluster.process_events import Failed, Progress, Ready

PLACE_KEPT_TIMEOUT_S = 10.0  # for Ray to say that a group's resources are still reserved
LOST_EXIT_CODE = -int(signal.SIGKILL)  # of a process whose actor is gone: the kernel has killed it

Files = dict[str, bytes]


class RayGroup(ABC):
    """What `launch` needs to keep a group alive. Owns placement group and actors until `close`."""

    def __init__(self, cluster: RayCluster, request: PlacementRequest, *, stop_order: int, only_here: bool) -> None:
        self.name = request.name
        self.stop_order = stop_order
        self._cluster = cluster
        self._request = request
        self._only_here = only_here
        self._placement: Placement | None = None
        self._ranks: tuple[RankHandle, ...] = ()
        self._places: tuple[Place, ...] = ()

    async def prepare(self, listener: ProcessListener) -> None:
        if self._ranks and await self._is_alive():
            return
        listener.on_event(self.name, Progress("waiting for a place"))
        await self._close_actors()
        try:
            if self._placement is None or not await self._placement.is_reserved(PLACE_KEPT_TIMEOUT_S):
                self._give_up_place()
                self._placement = await self._cluster.reserve(self._request, only_here=self._only_here)
            num_ranks = len(self._request.bundle_of_rank)
            self._ranks = tuple([await self._placement.start_actor(rank) for rank in range(num_ranks)])
            listener.on_event(self.name, Progress("starting actors"))
            places = await asyncio.gather(*(rank.place(ACTOR_START_TIMEOUT_S) for rank in self._ranks))
            await self._settle(places)
            self._places = tuple(places)
        except RankLost as error:
            await self._close_actors()
            raise StartupError(f"{self.name}: {error}") from error

    async def start(self, listener: ProcessListener) -> GroupProcess:
        hosts = [place.host for place in self._places]
        process = GroupProcess(self.name, self._ranks, hosts, listener, self._followed_files())
        await process.start([self._order(rank, place) for rank, place in enumerate(self._places)])
        return process

    async def close(self) -> None:
        """Actors and placement group go; what still runs is killed with them."""
        await self._close_actors()
        self._give_up_place()

    @abstractmethod
    async def _settle(self, places: Sequence[Place]) -> None:
        """The actors are at `places`, rank 0 first: choose what depends on it. Raises `RankLost`."""

    @abstractmethod
    def _order(self, rank: int, place: Place) -> Order: ...

    def _has_stayed(self, places: Sequence[Place]) -> bool:
        """Whether rank 0 is where it was before."""
        return bool(self._places) and self._places[0].node_id == places[0].node_id

    def _followed_files(self) -> AsyncIterator[Files] | None:
        """Files that rank 0 must have, now and after each change."""
        return None

    async def _is_alive(self) -> bool:
        try:
            await asyncio.gather(*(rank.place() for rank in self._ranks))
        except RankLost:
            return False
        return True

    async def _close_actors(self) -> None:
        ranks, self._ranks = self._ranks, ()
        await asyncio.gather(*(rank.close() for rank in ranks))

    def _give_up_place(self) -> None:
        if self._placement is not None:
            self._placement.remove_soon()
            self._placement = None


class GroupProcess:
    """One life of all processes of a group: a `RunningProcess`."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[RankHandle],
        hosts: Sequence[str],
        listener: ProcessListener,
        followed_files: AsyncIterator[Files] | None,
    ) -> None:
        self.ready = asyncio.Event()
        self.exited = asyncio.Event()
        self.was_too_slow = False
        self.pid = 0  # of rank 0, on its node
        self.exit_code: int | None = None
        self.how_it_ended = ""
        self.last_words: list[str] = []
        self._name = name
        self._ranks = ranks
        self._hosts = hosts
        self._listener = listener
        self._followed_files = followed_files
        self._is_stopping = False

    async def start(self, orders: Sequence[Order]) -> None:
        """Raises `StartupError`; the ranks that did start are killed then."""
        try:
            calls = (rank.call("start", encode(order)) for rank, order in zip(self._ranks, orders, strict=True))
            answers = [start_decoder.decode(answer) for answer in await asyncio.gather(*calls)]
        except RankLost as error:
            self.send(signal.SIGKILL)
            raise StartupError(f"{self._name}: {error}") from error
        for answer in reversed(answers):
            match answer:
                case NotStarted(why):
                    self.send(signal.SIGKILL)
                    raise StartupError(why)
                case Started(pid):
                    self.pid = pid

    async def wait(self) -> int:
        """Until all have ended. Cancelled: they are killed."""
        try:
            async with asyncio.TaskGroup() as group:
                files = group.create_task(self._copy_files())
                ranks = [group.create_task(self._follow(index)) for index in range(len(self._ranks))]
                await asyncio.wait(ranks)
                files.cancel()
        finally:
            if self.exit_code is None:
                self.send(signal.SIGKILL)
            self.exited.set()
        assert self.exit_code is not None
        return self.exit_code

    def kill_unless_ready(self) -> None:
        if not self.ready.is_set():
            self.was_too_slow = True
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        self._is_stopping = True
        for rank in self._ranks:
            rank.post("signal", int(number))

    async def _follow(self, index: int) -> None:
        try:
            async for batch in self._ranks[index].batches():
                for news in batch.news:
                    match news:
                        case Ended():
                            self._end(index, news.exit_code, news.how, news.last_words)
                            return
                        case Said(event):
                            self._on_event(index, event)
                        case Logged(line):
                            self._listener.on_log(self._name, line)
        except RankLost as error:
            self._end(index, LOST_EXIT_CODE, str(error), ())

    def _on_event(self, index: int, event: Progress | Ready | Failed) -> None:
        """Rank 0 speaks for the group; of the others only a failure matters, which comes with their last words."""
        if index:
            return
        if isinstance(event, Ready):
            self.ready.set()
        self._listener.on_event(self._name, event)

    def _end(self, index: int, exit_code: int, how: str, last_words: Sequence[str]) -> None:
        if not self.exit_code:  # the first one that failed is the cause
            rank = f"rank {index}, " if len(self._ranks) > 1 else ""
            self.exit_code = exit_code
            self.how_it_ended = f"{rank}{how}, on node {self._hosts[index]}"
            self.last_words = list(last_words)
        if not self._is_stopping:
            self.send(signal.SIGKILL)

    async def _copy_files(self) -> None:
        """Keep the copies at rank 0 like the files here."""
        if self._followed_files is None:
            return
        async for files in self._followed_files:
            for name, content in files.items():
                await self._put(name, content)

    async def _put(self, name: str, content: bytes) -> None:
        while True:
            try:
                await self._ranks[0].call("put", name, content)
                return
            except RankLost:  # for a moment, or `_follow` notices
                await asyncio.sleep(RETRY_PAUSE_S)
