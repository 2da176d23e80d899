"""Rank 0's side of the rendezvous: who has come, what they say, and who is gone."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from cluster.addresses import is_loopback
from cluster.config import ClusterConfig
from cluster.errors import StartupError
from cluster.launch.external_channel import Channel, ChannelLost, is_proven, prove
from cluster.launch.external_facts import own_seat
from cluster.launch.external_identity import Identity
from cluster.launch.external_messages import (
    MAX_LINE_BYTES,
    Done,
    Failed,
    Greeting,
    Hello,
    Message,
    Refused,
    Unable,
    Welcome,
)
from cluster.launch.external_parts import LOOPBACK, Seat, config_differences

HELLO_S = 10.0
SPARE_CONNECTIONS = 64  # beyond one for each rank


class Joined:
    """A rank has come."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The connection of a rank has ended. `why` begins with "it" or "its"."""

    why: str


News = Joined | Gone | Message


class Rendezvous:
    """`news` has everything that ranks say, in order; an item is (rank, what)."""

    def __init__(self, identity: Identity, config: ClusterConfig, key: bytes | None) -> None:
        self.news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self.seats = {0: own_seat()}
        self._identity = identity
        self._config = config
        self._key = key
        self._channels: dict[int, Channel] = {}
        self._connections: dict[asyncio.Task[None], Channel] = {}
        self._refusal: Refused | None = None
        self._told: set[int] = set()
        self._everyone_told = asyncio.Event()
        self._is_complete = False

    async def gather(self, timeout_s: float) -> tuple[Seat, ...]:
        """Wait for every rank. Raises `StartupError` naming the ranks that did not come, or could not start."""
        others = set(range(1, self._identity.world_size))
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._channels) < len(others):
                    rank, news = await self.news.get()
                    match news:
                        case Unable(host=host, why=why):
                            raise StartupError(f"rank {rank} on {host}: {why}")
                        case Failed(why):
                            raise StartupError(f"rank {rank} on {self.host_of(rank)} has failed: {why}")
                        case Gone(why):
                            raise StartupError(f"rank {rank} on {self.host_of(rank)} is gone before the start: {why}")
        except TimeoutError:
            missing = sorted(others - self._channels.keys())
            named = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            raise StartupError(
                f"after {timeout_s:g} s rank 0 on {self.seats[0].host} still waits for {named} of "
                f"{self._identity.world_size}; look at their output, and whether they can reach "
                f"{self._identity.host} (launch.rendezvous_port, launch.join_timeout_s)"
            ) from None
        self._is_complete = True
        return tuple(self.seats[rank] for rank in range(self._identity.world_size))

    async def refuse_everyone(self, why: str, timeout_s: float) -> None:
        """The user has been told: let the ranks that come know that they need not. Bounded."""
        self._refusal = Refused(why, is_told=True)
        for rank, channel in self._channels.items():
            channel.send(self._refusal)
            self._note_told(rank)
        try:
            async with asyncio.timeout(timeout_s):
                await self._everyone_told.wait()
        except TimeoutError:
            return

    def host_of(self, rank: int) -> str:
        return self.seats[rank].host if rank in self.seats else "an unknown host"

    @property
    def leader_address(self) -> str:
        """Rank 0's host as the others see it; empty if all are on it."""
        remote = (channel for rank, channel in self._channels.items() if self.seats[rank].address)
        return next((channel.own_address for channel in remote), "")

    def send(self, rank: int, message: Message) -> None:
        if rank in self._channels:
            self._channels[rank].send(message)

    def broadcast(self, message: Message) -> None:
        for rank in tuple(self._channels):
            self.send(rank, message)

    @property
    def connected(self) -> set[int]:
        return set(self._channels)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end."""
        channel = Channel(reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = channel
        try:
            if len(self._connections) <= self._identity.world_size + SPARE_CONNECTIONS:
                hello = await self._admit(channel)
                if hello is not None:
                    await self._follow(hello.rank, channel)
        except ChannelLost:
            return  # before it was admitted: nobody counts on it
        finally:
            await channel.close()
            del self._connections[task]

    async def close(self) -> None:
        """Ends every connection; their tasks end with them, what was sent has a moment to leave."""
        await asyncio.gather(*(channel.close() for channel in self._connections.values()))
        await asyncio.gather(*self._connections)

    async def _admit(self, channel: Channel) -> Hello | None:
        nonce = secrets.token_hex(16)
        channel.send(Greeting(version=version("tandem-serving"), job=self._identity.job, nonce=nonce))
        first = await channel.receive(HELLO_S)
        if not isinstance(first, Hello | Unable):
            return None
        if self._refusal is not None:
            channel.send(self._refusal)
            self._note_told(first.rank)
            return None
        if isinstance(first, Unable):
            self._report_unable(channel, first)
            return None
        nonces = (nonce, first.nonce)
        if problem := self._problem_with(first, nonces):
            self._report_unable(channel, Unable(first.rank, first.host, problem))
            return None
        self._channels[first.rank] = channel
        self.seats[first.rank] = _seat(first, channel)
        channel.send(Welcome(self.seats[0].host, prove(self._key, "rank 0", first.rank, nonces)))
        self.news.put_nowait((first.rank, Joined()))
        return first

    def _report_unable(self, channel: Channel, unable: Unable) -> None:
        """Ends the gathering; a stranger that comes later is told itself and changes nothing."""
        channel.send(Refused(unable.why, is_told=not self._is_complete))
        if not self._is_complete:
            self._note_told(unable.rank)
            self.news.put_nowait((unable.rank, unable))

    def _problem_with(self, hello: Hello, nonces: tuple[str, str]) -> str:
        if not is_proven(self._key, hello.proof, "rank", hello.rank, nonces):
            return "its cluster key is not that of rank 0; security.cluster_key_file must hold the same on every host"
        if hello.world_size != self._identity.world_size or not 1 <= hello.rank < hello.world_size:
            world_size = self._identity.world_size
            return f"it is rank {hello.rank} of {hello.world_size}, but rank 0 is one of {world_size}"
        if hello.rank in self._channels:
            return (
                f"rank {hello.rank} is already here, on {self.host_of(hello.rank)}; if this launch is not meant to be "
                "a part of that job, use --external none; if they are two jobs, give each its launch.rendezvous_port"
            )
        if differences := config_differences(self._config, hello.config):
            return f"its configuration differs from that of rank 0: {'; '.join(differences)}"
        return ""

    async def _follow(self, rank: int, channel: Channel) -> None:
        beating = asyncio.ensure_future(channel.beat())
        try:
            while True:
                message = await channel.receive()
                self.news.put_nowait((rank, message))
                if isinstance(message, Done):
                    return
        except ChannelLost as lost:
            self.news.put_nowait((rank, Gone(str(lost))))
        finally:
            beating.cancel()
            del self._channels[rank]
            self._note_told(rank)  # who has left needs no word

    def _note_told(self, rank: int) -> None:
        self._told.add(rank)
        if self._told.issuperset(range(1, self._identity.world_size)):
            self._everyone_told.set()


@asynccontextmanager
async def open_rendezvous(identity: Identity, config: ClusterConfig, key: bytes | None) -> AsyncIterator[Rendezvous]:
    """Listen until the block is left. Raises `StartupError` when no port can be had.

    On loopback if all ranks are on this host; else on all addresses, which the caller has permitted.
    """
    rendezvous = Rendezvous(identity, config, key)
    server = await _listen(rendezvous, identity, config.launch.rendezvous_port)
    try:
        yield rendezvous
    finally:
        server.close()
        await rendezvous.close()


async def _listen(rendezvous: Rendezvous, identity: Identity, configured: int) -> asyncio.Server:
    host = LOOPBACK if identity.is_local else None
    why = ""
    for port in identity.ports(configured):
        try:
            return await asyncio.start_server(rendezvous.serve, host, port, limit=MAX_LINE_BYTES)
        except OSError as error:
            why = f"port {port}: {error.strerror or error}"
    raise StartupError(f"launch.rendezvous_port: rank 0 on {socket.gethostname()} cannot listen, {why}")


def _seat(hello: Hello, channel: Channel) -> Seat:
    address = channel.peer_address
    is_here = is_loopback(address) or address == channel.own_address
    return Seat(
        host=hello.host,
        address="" if is_here else address,
        num_cores=hello.num_cores,
        cpus=frozenset(hello.cpus),
        num_gpus=hello.num_gpus,
        advertised_host=hello.advertised_host,
    )
