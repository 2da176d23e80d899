"""The transport seam: moving bytes between the KV pools of two processes.

A transport knows addresses and bytes; it knows nothing of requests, leases or blocks (that is
`core/`). `loopback.py` is the one for tests and single processes, `nixl.py` the one for the field.
All calls are non-blocking and made from one thread, the worker's engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NewType, Protocol

import msgspec
import torch

PeerId = NewType("PeerId", str)  # the peer's engine_id
TransferId = NewType("TransferId", int)


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Registered memory as a peer may address it. `device_id` is -1 for host memory."""

    name: str  # "kv" or "ledger"
    address: int
    num_bytes: int
    device_id: int


class PeerDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer tells in the handshake: enough to READ its regions, nothing executable."""

    engine_id: str
    transport: str
    agent_metadata: bytes  # the transport's own, opaque, bounded in size
    regions: tuple[Region, ...]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Copy `num_bytes` from `source_offset` of a remote region to `destination_offset` of a local one."""

    source_offset: int
    destination_offset: int
    num_bytes: int


class TransferState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Transport(Protocol):
    """Errors of the library below are mapped to `TransferFailed` here and nowhere else."""

    name: str

    def register(self, name: str, memory: torch.Tensor) -> Region:
        """Make a contiguous tensor readable by peers, until `close`."""
        ...

    def describe(self) -> PeerDescription: ...

    def connect(self, peer: PeerDescription) -> PeerId:
        """Idempotent per engine_id. Raises `TransferFailed`."""
        ...

    def disconnect(self, peer: PeerId) -> None:
        """Forget a peer and its memory; running transfers from it end as FAILED."""
        ...

    def read(self, peer: PeerId, region: str, local_region: str, pieces: Sequence[Piece]) -> TransferId:
        """Start a READ. The destination may be written until `poll` has said DONE or FAILED."""
        ...

    def poll(self, transfer: TransferId) -> TransferState:
        """DONE or FAILED is said once; the id is forgotten then and no byte can land any more."""
        ...

    def notify(self, peer: PeerId, message: bytes) -> bool:
        """Small best-effort message (a lost one costs a lease, never correctness). False: it did not leave."""
        ...

    def notifications(self) -> list[tuple[PeerId, bytes]]: ...

    def close(self) -> None:
        """Deregister everything. No transfer may be running."""
        ...
