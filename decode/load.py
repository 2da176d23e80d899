"""What one load needs besides its state: the READs of its data, cut into bounded batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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

# A READ of host memory within one machine may be over when it is posted, so this bounds how long the engine
# waits; between GPUs it never is, and few large ones are fastest.
MAX_READ_BYTES = 8 << 20
MAX_DEVICE_READ_BYTES = 256 << 20
MAX_READ_PIECES = 1024
# A READ without an end for so long, and for what its bytes may take, stands still: its source was paused or is cut off.
STALL_S, SLOWEST_BYTES_PER_S = 5.0, 100e6
SETTLE_S = 1.0  # pieces of a READ that failed may be on their way: copies within a machine or a fabric take far less
MAX_READS_AT_ONCE = 2
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


def batches(pieces: Sequence[Piece], max_bytes: int = MAX_READ_BYTES) -> Iterator[list[Piece]]:
    """Cut into READs of at most `max_bytes` and MAX_READ_PIECES; large pieces are split."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in _split(pieces, max_bytes):
        if batch and (num_bytes + piece.num_bytes > max_bytes or len(batch) >= MAX_READ_PIECES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += piece.num_bytes
    if batch:
        yield batch


def _split(pieces: Sequence[Piece], max_bytes: int) -> Iterator[Piece]:
    for piece in pieces:
        for start in range(0, piece.num_bytes, max_bytes):
            num_bytes = min(max_bytes, piece.num_bytes - start)
            yield Piece(piece.source_offset + start, piece.destination_offset + start, num_bytes)


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
