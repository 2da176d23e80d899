"""A transport inside one process: for tests, and to read the protocol without a network.

Transports that share a `LoopbackHub` reach each other by engine_id. A READ copies when it is polled,
not when it is posted, so that code which relies on early completion fails its tests. A test may hold
transfers back (`hub.is_stalled`) or make a peer disappear (`close`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from cluster.errors import TransferFailed
from kvconnector.base import PeerDescription, PeerId, Piece, Region, TransferId, TransferState


class LoopbackHub:
    """The memory that the transports of one test share."""

    def __init__(self) -> None:
        self.transports: dict[str, LoopbackTransport] = {}
        self.is_stalled = False


class LoopbackTransport:
    """A `Transport` (see `base.py`); everything that it is told is checked against its registrations."""

    name = "loopback"

    def __init__(self, engine_id: str, hub: LoopbackHub) -> None:
        self._engine_id = engine_id
        self._hub = hub
        self._memory: dict[str, torch.Tensor] = {}  # flat uint8 views
        self._peers: set[PeerId] = set()
        self._reads: dict[TransferId, tuple[PeerId, str, str, tuple[Piece, ...]]] = {}
        self._next_id = 0
        self._notifications: deque[tuple[PeerId, bytes]] = deque()
        hub.transports[engine_id] = self

    def register(self, name: str, memory: torch.Tensor) -> Region:
        assert memory.is_contiguous()
        self._memory[name] = memory.view(-1).view(torch.uint8)
        return self._region(name)

    def describe(self) -> PeerDescription:
        return PeerDescription(self._engine_id, self.name, b"", tuple(map(self._region, self._memory)))

    def connect(self, peer: PeerDescription) -> PeerId:
        if peer.engine_id not in self._hub.transports:
            raise TransferFailed(f"peer {peer.engine_id} is not in this process")
        self._peers.add(PeerId(peer.engine_id))
        return PeerId(peer.engine_id)

    def disconnect(self, peer: PeerId) -> None:
        self._peers.discard(peer)

    def read(self, peer: PeerId, region: str, local_region: str, pieces: Sequence[Piece]) -> TransferId:
        if peer not in self._peers:
            raise TransferFailed(f"peer {peer} is not connected")
        self._next_id += 1
        self._reads[TransferId(self._next_id)] = (peer, region, local_region, tuple(pieces))
        return TransferId(self._next_id)

    def poll(self, transfer: TransferId) -> TransferState:
        if self._hub.is_stalled:
            return TransferState.RUNNING
        peer, region, local_region, pieces = self._reads.pop(transfer)
        owner = self._hub.transports.get(peer)
        if owner is None or peer not in self._peers or region not in owner._memory:
            return TransferState.FAILED
        source, destination = owner._memory[region], self._memory[local_region]
        for piece in pieces:
            source_end, destination_end = (
                piece.source_offset + piece.num_bytes,
                piece.destination_offset + piece.num_bytes,
            )
            if source_end > len(source) or destination_end > len(destination):
                return TransferState.FAILED
            destination[piece.destination_offset : destination_end] = source[piece.source_offset : source_end]
        return TransferState.DONE

    def notify(self, peer: PeerId, message: bytes) -> bool:
        target = self._hub.transports.get(peer)
        if target is not None:
            target._notifications.append((PeerId(self._engine_id), message))
        return target is not None

    def notifications(self) -> list[tuple[PeerId, bytes]]:
        arrived = list(self._notifications)
        self._notifications.clear()
        return arrived

    def close(self) -> None:
        assert not self._reads, "a transfer is running"
        self._hub.transports.pop(self._engine_id, None)
        self._memory.clear()

    def _region(self, name: str) -> Region:
        memory = self._memory[name]
        return Region(name, memory.data_ptr(), len(memory), -1)
