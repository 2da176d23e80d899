"""How a rank finds rank 0 and is let in."""

from __future__ import annotations

import asyncio
import secrets
import time
from importlib.metadata import version

from cluster.config import ClusterConfig
from cluster.errors import StartupError
from cluster.launch.external_channel import Channel, ChannelLost, is_proven, prove
from cluster.launch.external_facts import own_seat
from cluster.launch.external_identity import Identity
from cluster.launch.external_messages import MAX_LINE_BYTES, Greeting, Hello, Refused, Unable, Welcome

CONNECT_S = 2.0
GREETING_S = 2.0
ANSWER_S = 5.0
PAUSE_S = 0.2


class Dismissed(Exception):
    """The launch has failed, and rank 0 has told the user why; the text says it, too."""


async def join(identity: Identity, config: ClusterConfig, key: bytes | None, timeout_s: float) -> tuple[Channel, str]:
    """The connection to rank 0, and the name of its host. Raises `StartupError`, or `Dismissed`."""
    channel, greeting = await _find(identity, config, timeout_s)
    try:
        ours = version("tandem-serving")
        if greeting.version != ours:
            raise StartupError(f"rank 0 runs version {greeting.version!r}, rank {identity.rank} runs {ours}")
        nonces = (greeting.nonce, secrets.token_hex(16))
        seat = own_seat()
        hello = Hello(
            rank=identity.rank,
            world_size=identity.world_size,
            host=seat.host,
            config=config,
            cpus=tuple(sorted(seat.cpus)),
            num_cores=seat.num_cores,
            num_gpus=seat.num_gpus,
            advertised_host=seat.advertised_host,
            nonce=nonces[1],
            proof=prove(key, "rank", identity.rank, nonces),
        )
        channel.send(hello)
        match await channel.receive(ANSWER_S):
            case Welcome(host, proof) if is_proven(key, proof, "rank 0", identity.rank, nonces):
                return channel, host
            case Refused(why, is_told=True):
                raise Dismissed(why)
            case Refused(why):
                raise StartupError(why)
        raise StartupError(f"what answers at {identity.host} is not rank 0: it does not know the cluster key")
    except ChannelLost as lost:
        await channel.close()
        raise StartupError(f"rank 0 at {identity.host} is gone before the start: {lost}") from None
    except BaseException:
        await channel.close()
        raise


async def report_problem(identity: Identity, config: ClusterConfig, why: str, timeout_s: float) -> bool:
    """Tell rank 0 why this rank cannot start. True if it has told the user."""
    try:
        channel, _ = await _find(identity, config, timeout_s)
    except StartupError:
        return False
    try:
        channel.send(Unable(identity.rank, own_seat().host, why))
        answer = await channel.receive(ANSWER_S)
    except ChannelLost:
        return False
    finally:
        await channel.close()
    return isinstance(answer, Refused) and answer.is_told


async def _find(identity: Identity, config: ClusterConfig, timeout_s: float) -> tuple[Channel, Greeting]:
    """Try the candidate ports until rank 0 of this job greets. It may not have started yet."""
    ports = identity.ports(config.launch.rendezvous_port)
    give_up_at = time.monotonic() + timeout_s
    why = "not tried"
    while time.monotonic() < give_up_at:
        for port in ports:
            try:
                return await _greeted(identity, port)
            except ChannelLost as lost:
                why = f"port {port}: {lost}"
        await asyncio.sleep(PAUSE_S)
    raise StartupError(
        f"rank {identity.rank} on {own_seat().host} found no rank 0 of its job at {identity.host} within "
        f"{timeout_s:g} s ({why}); is rank 0 running there? See launch.rendezvous_host and launch.rendezvous_port"
    )


async def _greeted(identity: Identity, port: int) -> tuple[Channel, Greeting]:
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(identity.host, port, limit=MAX_LINE_BYTES)
    except (OSError, TimeoutError) as error:
        raise ChannelLost(str(error) or "no answer") from error
    channel = Channel(reader, writer)
    try:
        greeting = await channel.receive(GREETING_S)
        if isinstance(greeting, Greeting) and greeting.job == identity.job:
            return channel, greeting
        raise ChannelLost("another job is there")
    except BaseException:
        await channel.close()
        raise
