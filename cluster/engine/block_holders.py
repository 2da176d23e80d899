"""What may hold KV blocks: tables of running sequences, leases of peers, destinations of transfers."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum


class BlockState(Enum):
    FREE = "free"
    OWNED = "owned"
    PINNED = "pinned"
    RESERVED = "reserved"
    LOADING = "loading"
    DRAINING = "draining"


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order of position. Valid until `BlockManager.free`."""

    block_ids: array[int]  # int32
    num_registered: int  # leading full blocks that were found in the prefix cache or offered to it
    num_cached_tokens: int  # leading tokens whose KV was found in the prefix cache
    epoch: int
    num_shrinks: int = 0  # how often blocks were given back: a copy of the table is stale then


@dataclass(slots=True, eq=False)
class Lease:
    """Keeps blocks readable for a peer, whatever becomes of the sequence. Valid until `release`."""

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]  # parallel to block_ids
    num_tokens: int


@dataclass(slots=True, eq=False)
class Reservation:
    """Destination of a transfer of `num_tokens` tokens. The first `num_cached_tokens` (full blocks) were
    found in the prefix cache and must not be written; `loading_block_ids` are to be filled. Valid until
    `commit`, `finish_draining`, or an `abort` that returned True."""

    block_ids: array[int]
    num_tokens: int
    num_cached_tokens: int
    num_shared_blocks: int
    epoch: int
    state: BlockState = BlockState.RESERVED

    @property
    def loading_block_ids(self) -> array[int]:
        return self.block_ids[self.num_shared_blocks :]
