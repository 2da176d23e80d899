"""The prefill workers a decode worker knows: one handshake each, remembered under their engine_id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cluster.control.messages import PeerAnswer, PeerQuestion
from cluster.errors import HandshakeMismatch, TransferFailed
from kvconnector.base import PeerId, Transport
from kvconnector.core import handshake as core
from kvconnector.mapping import Shard

MAX_PEERS = 1024
_Key = tuple[str, int]


@dataclass(slots=True)
class Peer:
    """One prefill process."""

    engine_id: PeerId
    endpoint: str
    state: core.PeerState = field(default_factory=core.PeerState)
    shard: Shard | None = None  # where its KV lies; None until connected
    waiting: set[_Key] = field(default_factory=set)  # loads that want it
    num_users: int = 0  # loads that have not given it back


class Peers:
    """Engine thread only. The callbacks tell loads, by their keys, what became of the peer."""

    def __init__(
        self,
        transport: Transport,
        shard: Shard,
        ask: Callable[[PeerQuestion], None],
        *,
        on_connected: Callable[[_Key, float], None],
        on_refused: Callable[[_Key, HandshakeMismatch, float], None],
        on_failed: Callable[[_Key, str, float], None],
    ) -> None:
        self._transport = transport
        self._shard = shard
        self._ask = ask
        self._on_connected = on_connected
        self._on_refused = on_refused
        self._on_failed = on_failed
        self._peers: dict[str, Peer] = {}
        self.num_refusals = 0

    def enter(self, engine_id: str, endpoint: str) -> Peer:
        """The peer, for a load that will use it; the load owes `leave`."""
        peer = self._peers.get(engine_id)
        if peer is None:
            self._make_room()
            peer = self._peers[engine_id] = Peer(PeerId(engine_id), endpoint)
        peer.num_users += 1
        return peer

    def want(self, peer: Peer, key: _Key, now: float) -> None:
        """The load `key` will be told when the peer is connected, perhaps within this call."""
        peer.waiting.add(key)
        self._step(peer, core.Wanted(), now)

    def leave(self, peer: Peer, key: _Key) -> None:
        peer.waiting.discard(key)
        peer.num_users -= 1

    def on_answer(self, answer: PeerAnswer, now: float) -> None:
        peer = self._peers.get(answer.engine_id)
        if peer is None or peer.state.phase is not core.PeerPhase.SHAKING:
            return  # too late
        if answer.mismatches:
            self.num_refusals += 1
            self._step(peer, core.Refused(answer.mismatches), now)
        elif answer.shards:
            self._connect(peer, answer, now)
        else:
            self._step(peer, core.Failed(answer.failure), now)

    def on_broken(self, peer: Peer, now: float) -> None:
        """A READ from the peer failed."""
        self._step(peer, core.TransportBroke(), now)

    def poll(self, now: float) -> None:
        for peer in tuple(self._peers.values()):
            self._step(peer, core.Tick(), now)

    def _connect(self, peer: Peer, answer: PeerAnswer, now: float) -> None:
        [(shard, description)] = answer.shards
        self._forget_predecessors(peer, now)
        try:
            _check_covers(shard, self._shard)
            self._transport.connect(description)
        except TransferFailed as error:
            self._step(peer, core.Failed(error.message), now)
            return
        peer.shard = shard
        self._step(peer, core.Compatible(), now)

    def _forget_predecessors(self, peer: Peer, now: float) -> None:
        """A process that was restarted at the same address: its predecessor's memory is gone, and must
        not stay mapped here (vllm#58063)."""
        for other in [each for each in self._peers.values() if each.endpoint == peer.endpoint and each is not peer]:
            self._transport.disconnect(other.engine_id)
            other.shard = None
            other.state = core.PeerState()
            for key in self._take_waiting(other):
                self._on_failed(key, f"{other.endpoint} was restarted", now)
            if not other.num_users:
                del self._peers[other.engine_id]

    def _make_room(self) -> None:
        """Tickets are signed, so peers are real; still their number is bounded."""
        idle = [peer for peer in self._peers.values() if not peer.num_users]
        for peer in idle[: max(0, len(self._peers) - MAX_PEERS + 1)]:
            self._transport.disconnect(peer.engine_id)
            del self._peers[peer.engine_id]

    def _step(self, peer: Peer, event: core.PeerEvent, now: float) -> None:
        peer.state, effects = core.step(peer.state, event, now)
        for effect in effects:
            match effect:
                case core.Ask():
                    self._ask(PeerQuestion(peer.engine_id, peer.endpoint))
                case core.TellConnected():
                    for key in self._take_waiting(peer):
                        self._on_connected(key, now)
                case core.TellRefused(mismatches):
                    for key in self._take_waiting(peer):
                        self._on_refused(key, mismatch_error(mismatches), now)
                case core.TellFailed(reason):
                    for key in self._take_waiting(peer):
                        self._on_failed(key, reason, now)
                case core.Disconnect():
                    peer.shard = None
                    self._transport.disconnect(peer.engine_id)

    def _take_waiting(self, peer: Peer) -> list[_Key]:
        waiting = sorted(peer.waiting)
        peer.waiting.clear()
        return waiting


def _check_covers(theirs: Shard, ours: Shard) -> None:
    """Raises `TransferFailed` unless one rank there holds just what this one does, in blocks of any size.
    The planner can do more; records and verdicts of several ranks cannot be combined yet."""
    same_blocks = msgspec.structs.replace(theirs.layout, block_size=ours.layout.block_size)
    if (same_blocks, theirs.layers, theirs.kv_heads) != (ours.layout, ours.layers, ours.kv_heads):
        raise TransferFailed(f"its rank holds {theirs}, this one {ours}")


def mismatch_error(mismatches: tuple[core.FieldMismatch, ...]) -> HandshakeMismatch:
    """In the words of the prefill worker, which compared: "ours" are its values."""
    return HandshakeMismatch({field: (ours, theirs) for field, ours, theirs in mismatches})
