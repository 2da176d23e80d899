"""Ranks meet: who is let in, what is said about those who are not, and that a silent or dead peer is noticed."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import msgspec
import pytest

from cluster.config import ClusterConfig, load_config
from cluster.errors import StartupError
from cluster.launch import external_channel, external_join
from cluster.launch.external_channel import Channel, ChannelLost
from cluster.launch.external_identity import Identity
from cluster.launch.external_join import Dismissed, join, report_problem
from cluster.launch.external_messages import Assigned, Beat, Greeting, Refused, State, Stop, decoder
from cluster.launch.external_rendezvous import Gone, Rendezvous, open_rendezvous
from cluster.launch.ports import choose_free_port
from cluster.launch.topology import plan_topology

KEY = b"k" * 32
WAIT_S = 60.0


def identity(rank: int, world_size: int = 3, job: str = "slurm/7.0") -> Identity:
    return Identity("slurm", rank, world_size, "127.0.0.1", job)


def configured(**keys: object) -> ClusterConfig:
    return load_config(overrides=[("test", key.replace("__", "."), str(value)) for key, value in keys.items()])


CONFIG = configured()


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run at the same time are different jobs."""
    ports = tuple(choose_free_port("127.0.0.1") for _ in range(4))
    monkeypatch.setattr(Identity, "ports", lambda self, configured: ports)


@asynccontextmanager
async def joined(rank: int, key: bytes | None = None, world_size: int = 3) -> AsyncIterator[Channel]:
    channel, _ = await join(identity(rank, world_size), CONFIG, key, WAIT_S)
    beating = asyncio.ensure_future(channel.beat())
    try:
        yield channel
    finally:
        beating.cancel()
        await channel.close()


async def next_news(rendezvous: Rendezvous, kind: type) -> object:
    async with asyncio.timeout(WAIT_S):
        while True:
            _, news = await rendezvous.news.get()
            if isinstance(news, kind):
                return news


@pytest.mark.parametrize("key", [None, KEY])
async def test_all_come_and_talk(key: bytes | None) -> None:
    async with open_rendezvous(identity(0), CONFIG, key) as rendezvous, joined(1, key) as one, joined(2, key) as two:
        seats = await rendezvous.gather(WAIT_S)
        assert [seat.host for seat in seats] == [socket.gethostname()] * 3
        assert [seat.address for seat in seats] == ["", "", ""]
        assert all(seat.num_cores >= 1 and seat.cpus for seat in seats)
        assert rendezvous.leader_address == ""
        group = plan_topology(CONFIG, 1).groups[1]
        sent = Assigned(group=group, reachable_host="127.0.0.1", key_file="/x")
        rendezvous.send(2, sent)
        assert await two.receive() == sent
        one.send(State("ready", 77))
        assert await next_news(rendezvous, State) == State("ready", 77)


async def test_a_rank_may_come_before_rank_0() -> None:
    early = asyncio.create_task(join(identity(1, 2), CONFIG, None, WAIT_S))
    await asyncio.sleep(0.3)
    async with open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous:
        await rendezvous.gather(WAIT_S)
        channel, host = await early
        assert host == socket.gethostname()
        await channel.close()


async def test_ranks_that_do_not_come_are_named() -> None:
    async with open_rendezvous(identity(0, 4), CONFIG, None) as rendezvous, joined(2, world_size=4):
        with pytest.raises(StartupError, match="still waits for ranks 1, 3 of 4"):
            await rendezvous.gather(0.5)


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, b"x" * 32), (KEY, None), (None, KEY)])
async def test_another_key_is_refused_and_the_user_is_told_by_rank_0(ours: bytes | None, theirs: bytes | None) -> None:
    async with open_rendezvous(identity(0), CONFIG, ours) as rendezvous:
        gathering = asyncio.create_task(rendezvous.gather(WAIT_S))
        with pytest.raises(Dismissed, match="its cluster key is not that of rank 0"):
            await join(identity(1), CONFIG, theirs, WAIT_S)
        with pytest.raises(StartupError, match=r"rank 1 on .*: its cluster key"):
            await gathering


async def test_a_rank_0_that_does_not_know_the_key_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.launch.external_rendezvous.is_proven", lambda *_: True)
    async with open_rendezvous(identity(0), CONFIG, b"a stranger's key, long enough for all"):
        with pytest.raises(StartupError, match="does not know the cluster key"):
            await join(identity(1), CONFIG, KEY, WAIT_S)


@pytest.mark.parametrize(
    ("who", "config", "expected"),
    [
        (identity(1), configured(prefill__replicas=3), "prefill.replicas is 3 there and 1 here"),
        (identity(1, 4), CONFIG, "it is rank 1 of 4, but rank 0 is one of 3"),
    ],
)
async def test_what_does_not_fit_ends_the_start(who: Identity, config: ClusterConfig, expected: str) -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous:
        gathering = asyncio.create_task(rendezvous.gather(WAIT_S))
        with pytest.raises(Dismissed):
            await join(who, config, None, WAIT_S)
        with pytest.raises(StartupError) as caught:
            await gathering
        assert expected in caught.value.message


async def test_a_stranger_after_the_start_changes_nothing() -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous, joined(1) as one, joined(2):
        await rendezvous.gather(WAIT_S)
        with pytest.raises(StartupError, match=r"rank 1 is already here.*--external none"):
            await join(identity(1), CONFIG, None, WAIT_S)
        one.send(State("ready", 1))
        assert await next_news(rendezvous, State) == State("ready", 1)
        assert rendezvous.connected == {1, 2}


async def test_a_rank_that_cannot_start_lets_rank_0_say_so() -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous:
        gathering = asyncio.create_task(rendezvous.gather(WAIT_S))
        assert await report_problem(identity(2), CONFIG, "no key file", WAIT_S)
        with pytest.raises(StartupError, match=r"rank 2 on .*: no key file"):
            await gathering


async def test_a_peer_writes_no_control_sequences_to_a_terminal() -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous:
        gathering = asyncio.create_task(rendezvous.gather(WAIT_S))
        await report_problem(identity(2), CONFIG, "red \x1b[31m, and\nanother line \x9b2J", WAIT_S)
        with pytest.raises(StartupError) as caught:
            await gathering
        assert caught.value.message.endswith("red �[31m, and\nanother line �2J")


async def test_without_rank_0_a_rank_says_so_itself() -> None:
    assert not await report_problem(identity(2), CONFIG, "no key file", 0.3)
    with pytest.raises(StartupError, match=r"found no rank 0 of its job at 127\.0\.0\.1 within 0\.3 s"):
        await join(identity(2), CONFIG, None, 0.3)


async def test_ranks_that_come_to_a_failed_start_are_told_and_rank_0_waits_for_them() -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous, joined(1) as early:
        refusing = asyncio.create_task(rendezvous.refuse_everyone("wrong world", WAIT_S))
        assert await early.receive() == Refused("wrong world", is_told=True)
        assert not refusing.done()
        with pytest.raises(Dismissed, match="wrong world"):
            await join(identity(2), CONFIG, None, WAIT_S)
        await asyncio.wait_for(refusing, WAIT_S)


async def test_a_connection_that_ends_and_one_that_is_silent_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_rendezvous(identity(0), CONFIG, None) as rendezvous, joined(1) as one:
        await one.close()
        assert await next_news(rendezvous, Gone) == Gone("its connection ended")
        monkeypatch.setattr(Channel.receive, "__defaults__", (0.3,))
        channel, _ = await join(identity(2), CONFIG, None, WAIT_S)  # and no heartbeat
        assert await next_news(rendezvous, Gone) == Gone("it has been silent for 0.3 s")
        await channel.close()


async def test_heartbeats_keep_a_quiet_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_channel, "BEAT_S", 0.05)
    monkeypatch.setattr(Channel.receive, "__defaults__", (0.9,))
    async with open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous, joined(1, world_size=2) as one:
        await rendezvous.gather(WAIT_S)
        await asyncio.sleep(1.0)
        one.send(State("ready", 1))
        assert await next_news(rendezvous, State) == State("ready", 1)


async def test_a_process_that_was_paused_itself_does_not_blame_its_peer() -> None:
    async with open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous, joined(1, world_size=2) as one:
        await rendezvous.gather(WAIT_S)
        receiving = asyncio.create_task(one.receive(0.5))
        await asyncio.sleep(0.05)
        rendezvous.send(1, Stop())
        time.sleep(1.0)  # noqa: ASYNC251  as if by SIGSTOP: the time is over, and the message is there
        assert await receiving == Stop()


async def test_foreign_servers_on_the_ports_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one says nothing, the second speaks HTTP, and rank 0 of another job is on the third."""
    monkeypatch.setattr(external_join, "GREETING_S", 0.2)
    first, second, third, _ = identity(1).ports(0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await reader.read()
        writer.close()

    async def chatty(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    servers = [await asyncio.start_server(silent, "127.0.0.1", first)]
    servers.append(await asyncio.start_server(chatty, "127.0.0.1", second))
    other = identity(0, 2, job="slurm/6.0")
    async with open_rendezvous(other, CONFIG, None), open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous:
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(chatty, "127.0.0.1", third)
        channel, _ = await join(identity(1, 2), CONFIG, None, WAIT_S)
        await rendezvous.gather(WAIT_S)
        await channel.close()
    for server in servers:
        server.close()


async def test_no_free_port_is_named() -> None:
    async with AsyncExitStack() as stack:
        for _ in identity(0).ports(0):
            await stack.enter_async_context(open_rendezvous(identity(0), CONFIG, None))
        with pytest.raises(StartupError, match=r"launch\.rendezvous_port: rank 0 on .* cannot listen"):
            await stack.enter_async_context(open_rendezvous(identity(0), CONFIG, None))


@pytest.mark.parametrize("line", [b"{}\n", b"\xff\n", b"x" * 600_000, b'{"type":"hello","rank":"one"}\n', b"\n"])
async def test_nonsense_is_dropped_and_harms_nobody(line: bytes) -> None:
    async with open_rendezvous(identity(0, 2), CONFIG, None) as rendezvous:
        reader, writer = await asyncio.open_connection("127.0.0.1", identity(0).ports(0)[0])
        assert isinstance(decoder.decode(await reader.readline()), Greeting)
        writer.write(line)
        async with asyncio.timeout(WAIT_S):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        async with joined(1, world_size=2):
            await rendezvous.gather(WAIT_S)


async def test_a_peer_that_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_channel, "MAX_UNSENT_BYTES", 1000)
    accepted: asyncio.Queue[Channel] = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: accepted.put_nowait(Channel(*streams)), "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()):
        channel = await accepted.get()
        for _ in range(10_000):  # more than the kernel's buffers take
            channel.send(Refused("x" * 1000, is_told=True))
        with pytest.raises(ChannelLost, match="its connection ended"):
            await channel.receive(WAIT_S)
        await channel.close()
    server.close()


def test_every_message_survives_its_line() -> None:
    group = plan_topology(configured(prefill__port=7000), 2).groups[0]
    for message in (Beat(), Assigned(group=group, reachable_host="h"), State("ready", 4)):
        assert decoder.decode(msgspec.json.encode(message)) == message
    assert replace(group, port=1) != group
