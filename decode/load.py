"""What one load needs besides its state, and the memory that its records land in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cluster.engine.block_holders import Reservation
from cluster.errors import TicketInvalid
from cluster.types import KVHandle, Request
from decode.peers import Peer
from kvconnector.base import Piece, TransferId
from kvconnector.core.load import LoadState
from kvconnector.ledger import LedgerRecords, record_bytes
from kvconnector.mapping import join

MIN_SOURCE_BLOCK_SIZE = 16  # bounds the number of a prompt's records


@dataclass(slots=True, eq=False)
class Load:
    """One request on its way from a handle to verified blocks. `state` is the core's; the rest belongs
    to whoever carries out its effects."""

    request: Request
    handle: KVHandle
    peer: Peer
    state: LoadState
    began_at: float
    reservation: Reservation | None = None
    landing_row: int | None = None
    unposted: deque[tuple[str, str, list[Piece]]] = field(default_factory=deque)  # (region, local region, pieces)
    running: list[TransferId] = field(default_factory=list)
    moved_at: float = 0.0  # when a READ was posted or ended last
    settling: deque[float] = field(default_factory=deque)  # for each READ that failed: when nothing of it can land

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.request.attempt

    @property
    def first_read_block(self) -> int:
        """Index of the first source block that holds a token which the prefix cache lacks."""
        assert self.reservation is not None
        return self.reservation.num_cached_tokens // self.handle.block_size


class Landing:
    """Registered host memory into which ledgers are READ: one row per load that is under way."""

    def __init__(self, num_rows: int, max_blocks: int, num_kv_heads: int) -> None:
        self._record_bytes = record_bytes(num_kv_heads)
        self._words = self._record_bytes // 8
        self.max_blocks = max_blocks
        self.memory = torch.zeros((num_rows, max_blocks, self._words), dtype=torch.int64)
        self._free = list(range(num_rows))

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, row: int) -> None:
        self._free.append(row)

    def pieces(self, row: int, source_block_ids: Sequence[int]) -> list[Piece]:
        """To READ the records of these blocks, in this order."""
        size, base = self._record_bytes, row * self.max_blocks * self._record_bytes
        records = (Piece(block * size, base + index * size, size) for index, block in enumerate(source_block_ids))
        return list(join(records))

    def records(self, row: int, num_blocks: int) -> LedgerRecords:
        """A copy of what has landed."""
        return LedgerRecords(np.array(self.memory[row, :num_blocks].numpy()))


def check_belongs(request: Request, handle: KVHandle) -> None:
    """Raises `TicketInvalid` unless the handle is of this attempt and of exactly the tokens before the
    newest."""
    if (handle.request_id, handle.attempt) != (request.request_id, request.attempt):
        raise TicketInvalid("the ticket belongs to another request or attempt")
    if handle.num_tokens != len(request.token_ids) - 1:
        counts = f"{handle.num_tokens} tokens, the request has {len(request.token_ids)} with the newest"
        raise TicketInvalid(f"the ticket covers {counts}")
    if handle.block_size < MIN_SOURCE_BLOCK_SIZE:
        raise TicketInvalid(f"the ticket's block_size {handle.block_size} is below {MIN_SOURCE_BLOCK_SIZE}")
