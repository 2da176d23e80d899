"""Block tables of the running sequences on the host, kept from step to step: a step copies what is new."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.engine.batch import ScheduledSequence
from cluster.engine.block_holders import BlockTable
from cluster.engine.sequence import Sequence


class BlockRows:
    """One row per sequence. A row is taken back when its sequence has lost its blocks."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self._blocks = np.zeros((num_rows, max_blocks), np.int32)
        # What the row mirrors: how many blocks of it, and after how many shrinks.
        self._known: list[tuple[BlockTable, int, int] | None] = [None] * num_rows
        self._owners: list[Sequence | None] = [None] * num_rows
        self._row_of: dict[int, int] = {}  # by identity of the sequence, which the row keeps alive
        self._free = list(range(num_rows))

    def gather(self, scheduled: tuple[ScheduledSequence, ...]) -> npt.NDArray[np.int32]:
        """(B, M): the tables of these sequences, M the longest of them; what lies past a sequence's own blocks
        is never read."""
        longest = 1
        rows = np.empty(len(scheduled), np.int64)
        for index, entry in enumerate(scheduled):
            sequence = entry.sequence
            table = sequence.table
            assert table is not None
            row = self._row_of.get(id(sequence))
            if row is None:
                row = self._take_row(sequence)
            count = len(table.block_ids)
            known = self._known[row]
            if known is None or known[0] is not table or known[1:] != (count, table.num_shrinks):
                self._blocks[row, :count] = np.frombuffer(table.block_ids, np.int32)
                self._known[row] = (table, count, table.num_shrinks)
            rows[index] = row
            longest = max(longest, count)
        return self._blocks[rows, :longest]

    def _take_row(self, sequence: Sequence) -> int:
        if not self._free:
            self._take_back()
        row = self._free.pop()
        self._row_of[id(sequence)] = row
        self._owners[row] = sequence
        self._known[row] = None
        return row

    def _take_back(self) -> None:
        for row, owner in enumerate(self._owners):
            if owner is not None and (owner.is_finished or owner.table is None):
                del self._row_of[id(owner)]
                self._owners[row] = self._known[row] = None
                self._free.append(row)
        if not self._free:  # more sequences have blocks than usually run at once: loaded ones that wait
            count = len(self._owners)
            self._blocks = np.concatenate((self._blocks, np.zeros_like(self._blocks)))
            self._known += [None] * count
            self._owners += [None] * count
            self._free = list(range(count, 2 * count))
