"""What a prefill worker tells about each of its blocks, in memory that peers READ after the data.

    ledger (num_blocks, 2 + H) int64:   generation | filled tokens | digest of each KV head

A seqlock without the lock. The owner writes the generation when a block is allocated, before anything
is written into the block; a reader that READs the data first and this record second has what it was
promised if the generation is the promised one. The digests cover the first `filled` tokens of the
block (kvconnector/digest.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvconnector.digest import Digests, KVDigester, Span

GENERATION, FILLED, FIRST_DIGEST = 0, 1, 2
WORD_BYTES = 8


def record_bytes(num_kv_heads: int) -> int:
    return (FIRST_DIGEST + num_kv_heads) * WORD_BYTES


class Ledger:
    """The owner's side. Engine thread only. `memory` is host memory, to be registered by the caller.

    Digests may take a while (on a GPU they are computed beside the steps): a record says `filled` only
    once they are there, and `poll` brings them in. A block that was allocated anew meanwhile is left alone.
    """

    def __init__(self, num_blocks: int, block_size: int, num_kv_heads: int, digester: KVDigester) -> None:
        self.memory = torch.zeros((num_blocks, FIRST_DIGEST + num_kv_heads), dtype=torch.int64)
        self._records: npt.NDArray[np.int64] = self.memory.numpy()
        self._block_size = block_size
        self._digester = digester
        self._begun = [0] * num_blocks  # tokens of each block whose digests are known or on their way
        self._waiting: deque[_Waiting] = deque()

    @property
    def is_waiting(self) -> bool:
        """Digests are on their way: `poll` soon."""
        return bool(self._waiting)

    def on_allocated(self, block_id: int, generation: int) -> None:
        """Must be called before the new owner writes the block."""
        self._begun[block_id] = 0
        self._records[block_id, FILLED] = 0
        self._records[block_id, FIRST_DIGEST:] = 0
        self._records[block_id, GENERATION] = generation

    def advance(self, block_ids: Sequence[int], num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens of a sequence is stored. Cheap for blocks that are
        recorded already, shared ones included."""
        spans = []
        for index in range(-(-num_tokens // self._block_size)):
            block_id, first = block_ids[index], index * self._block_size
            filled = min(num_tokens - first, self._block_size)
            if self._begun[block_id] < filled:
                spans.append(Span(block_id, first, self._begun[block_id], filled))
                self._begun[block_id] = filled
        if spans:
            generations = [int(self._records[span.block_id, GENERATION]) for span in spans]
            self._waiting.append(_Waiting(spans, generations, self._digester.begin(spans)))
            self.poll()

    def poll(self) -> None:
        """Record the digests that have arrived, in the order in which they were begun."""
        while self._waiting and self._waiting[0].digests.is_ready():
            spans, generations, digests = self._waiting.popleft()
            for span, generation, digests_H in zip(spans, generations, digests.values(), strict=True):
                record = self._records[span.block_id]
                if record[GENERATION] == generation:
                    record[FIRST_DIGEST:] += digests_H.view(np.int64)
                    record[FILLED] = span.end


class _Waiting(NamedTuple):
    spans: list[Span]
    generations: list[int]  # of the blocks when the digests were begun
    digests: Digests


class Verdict(Enum):
    """What a reader concludes from the records of one handle."""

    GOOD = "good"
    NOT_FILLED = "not filled"  # read again later
    STALE = "stale"  # freed and reused meanwhile: what was read is worthless
    WRONG_DIGEST = "wrong digest"


class LedgerRecords(NamedTuple):
    """Records as READ, parallel to a handle's block_ids: (B, 2 + H) int64."""

    records: npt.NDArray[np.int64]

    def judge_filling(self, generations: Sequence[int], num_tokens: int, block_size: int) -> Verdict:
        """GOOD if every block still holds what the handle promised, completely."""
        if not np.array_equal(self.records[:, GENERATION], np.asarray(generations, dtype=np.int64)):
            return Verdict.STALE
        needed = np.full(len(self.records), block_size, dtype=np.int64)
        needed[-1] = num_tokens - block_size * (len(self.records) - 1)
        if (self.records[:, FILLED] < needed).any():
            return Verdict.NOT_FILLED
        return Verdict.GOOD

    def digests(self) -> npt.NDArray[np.uint64]:
        """(H,) sums over all blocks: the digest of all tokens of the handle."""
        total: npt.NDArray[np.uint64] = self.records[:, FIRST_DIGEST:].view(np.uint64).sum(axis=0, dtype=np.uint64)
        return total
