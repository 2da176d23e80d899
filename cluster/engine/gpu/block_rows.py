"""Block tables of the running sequences on the host, kept from step to step: a step copies what is new."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.engine.block_holders import BlockTable
from cluster.engine.sequence import Sequence


@dataclass(slots=True)
class _Row:
    """One sequence's, which it keeps alive, and what it mirrors: so many blocks of that table, after so many
    shrinks."""

    index: int
    owner: Sequence
    table: BlockTable | None = None
    num_blocks: int = 0
    num_shrinks: int = 0


class BlockRows:
    """One row per sequence. A row is taken back when its sequence has lost its blocks."""

    def __init__(self, num_rows: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._blocks = np.zeros((num_rows, max_blocks), np.int32)
        self._row_of: dict[int, _Row] = {}  # by identity of the sequence
        self._free = list(range(num_rows))

    def update(self, sequences: Iterable[Sequence]) -> list[int]:
        """Copy what is new in their tables; the numbers of their rows, valid while they have blocks."""
        indices = []
        for sequence in sequences:
            row = self._row_of.get(id(sequence))
            if row is None:
                row = self._take_row(sequence)
            table = sequence.table
            assert table is not None
            count = len(table.block_ids)
            if row.num_blocks != count or row.table is not table or row.num_shrinks != table.num_shrinks:
                self._blocks[row.index, :count] = np.frombuffer(table.block_ids, np.int32)
                row.table, row.num_blocks, row.num_shrinks = table, count, table.num_shrinks
            indices.append(row.index)
        return indices

    def gather(self, rows_B: ListLike[int] | npt.NDArray[np.int64], num_columns: int) -> npt.NDArray[np.int32]:
        """(B, M): the first blocks of these rows; what lies past a sequence's own blocks is never read."""
        return self._blocks[rows_B, :num_columns]

    def _take_row(self, sequence: Sequence) -> _Row:
        if not self._free:
            self._take_back()
        row = self._row_of[id(sequence)] = _Row(self._free.pop(), sequence)
        return row

    def _take_back(self) -> None:
        for row in list(self._row_of.values()):
            if row.owner.is_finished or row.owner.table is None:
                del self._row_of[id(row.owner)]
                self._free.append(row.index)
        if not self._free:  # more sequences have blocks than usually run at once: loaded ones that wait
            count = len(self._blocks)
            self._blocks = np.concatenate((self._blocks, np.zeros_like(self._blocks)))
            self._free = list(range(count, 2 * count))
