"""A step as 32-bit words, in the order in which `StepStaging` packs them for the device.

A step of a cohort differs from the one before by one position for each sequence, so its words are the
earlier ones, moved on; any other step is laid out from its entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.engine.batch import Batch, ScheduledSequence
from cluster.engine.forward_input import prompt_logprob_range
from cluster.engine.gpu.block_rows import BlockRows
from cluster.engine.gpu.shapes import StepShape
from cluster.engine.kernels.triton.plans import SPLIT_KEYS

Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True)
class StepBounds:
    """What sizes a step: its shape, its longest context, the sum of its contexts."""

    shape: StepShape
    longest: int
    num_keys: int


class StepWords:
    """`memory` is written from its beginning; nobody else writes there while this object is in use."""

    def __init__(self, memory: Int32Array, batch: Batch, bounds: StepBounds) -> None:
        self._memory = memory
        self._batch = batch
        self.bounds = bounds
        self._num_words = 0
        shape = bounds.shape
        self._query_start = self._take(shape.num_sequences + 1)
        self._context_B = self._take(shape.num_sequences)
        self._logits_R = self._take(shape.num_logits)
        self._token_T = self._take(shape.num_rows)
        self._source_T = self._take(shape.num_rows)
        self._position_T = self._take(shape.num_rows)
        self._slot_T = self._take(shape.num_rows)

    def lay_out(
        self,
        rows_B: Int32Array,
        starts_B: Int32Array,
        logits_of_entry: tuple[range, ...],
        row_drawn: dict[int, int],
        blocks: BlockRows,
    ) -> None:
        scheduled, num_sequences = self._batch.scheduled, len(rows_B)
        num_rows = int(rows_B.sum())
        self._query_start[0] = 0
        np.cumsum(rows_B, out=self._query_start[1 : num_sequences + 1])
        self._query_start[num_sequences + 1 :] = num_rows
        np.add(starts_B, rows_B, out=self._context_B[:num_sequences])
        self._context_B[num_sequences:] = 1
        self._token_T[:] = 0
        self._source_T[:] = -1
        row_sequence_T = np.repeat(np.arange(num_sequences), rows_B)
        position_T = self._position_T[:num_rows]
        self._position_T[num_rows:] = 0
        offsets_B = starts_B - self._query_start[:num_sequences]
        np.add(np.arange(num_rows, dtype=np.int32), offsets_B[row_sequence_T], out=position_T)
        self._copy_tokens(scheduled, row_drawn)
        self._fill_logits(scheduled, logits_of_entry)
        self._blocks, self._block_size = blocks, blocks.block_size
        self._rows_B = np.asarray(blocks.update([entry.sequence for entry in scheduled]), np.int64)
        block_T = self._table()[row_sequence_T, position_T // self._block_size]
        np.add(block_T * self._block_size, position_T % self._block_size, out=self._slot_T[:num_rows])
        self._slot_T[num_rows:] = -1

    def is_followed_by(self, batch: Batch) -> bool:
        last = self._batch
        return batch.is_continued and batch.cohort is last.cohort and batch.age == last.age + 1

    def move_on(self, batch: Batch) -> None:
        """To the words of a batch that follows."""
        cohort = batch.cohort
        assert cohort is not None
        self._batch = batch
        count = len(cohort.sequences)
        self._context_B[:count] += 1
        self._position_T[:count] += 1
        self._slot_T[:count] += 1
        self._token_T[:count] = 0
        self._source_T[:count] = np.arange(count)  # what the step before has drawn for them, row by row
        opening = cohort.opening(batch.age)
        if opening:
            self._blocks.update([cohort.sequences[place] for place in opening])
            for place in opening:
                table = cohort.sequences[place].table
                assert table is not None
                block = (cohort.starts[place] + batch.age) // self._block_size
                self._slot_T[place] = table.block_ids[block] * self._block_size
        bounds = self.bounds
        bounds.longest += 1
        bounds.num_keys += count
        if not bounds.shape.has_many_splits and bounds.longest > SPLIT_KEYS:
            bounds.shape = replace(bounds.shape, has_many_splits=True)

    def copy_to(self, target: Int32Array) -> int:
        """The words and the block table behind them: how many columns the table has."""
        target[: self._num_words] = self._memory[: self._num_words]
        table_BM = self._table()
        num_sequences, num_columns = table_BM.shape
        end = self._num_words + self.bounds.shape.num_sequences * num_columns
        place = target[self._num_words : end].reshape(-1, num_columns)
        place[:num_sequences] = table_BM
        place[num_sequences:] = 0
        return int(num_columns)

    def _table(self) -> Int32Array:
        return self._blocks.gather(self._rows_B, -(-self.bounds.longest // self._block_size))

    def _copy_tokens(self, scheduled: tuple[ScheduledSequence, ...], row_drawn: dict[int, int]) -> None:
        places, tokens = [], []  # of single rows, which are most
        pending, sources = [], []
        place = 0
        for entry in scheduled:
            end = stop = place + entry.num_tokens
            if entry.drafts:  # never behind a pending token
                stop -= len(entry.drafts)
                self._token_T[stop:end] = entry.drafts
            if entry.reads_pending_token:
                stop -= 1
                pending.append(stop)
                sources.append(row_drawn[id(entry.sequence)])
            if stop == place + 1:
                places.append(place)
                tokens.append(entry.sequence.token_ids[entry.start])
            elif stop > place:
                first = entry.start
                # A view of the sequence's own array, gone before anything can grow it.
                self._token_T[place:stop] = np.frombuffer(entry.sequence.token_ids, np.int32)[
                    first : first + stop - place
                ]
            place = end
        self._token_T[places] = tokens
        self._source_T[pending] = sources

    def _fill_logits(self, scheduled: tuple[ScheduledSequence, ...], logits_of_entry: tuple[range, ...]) -> None:
        self._logits_R[:] = 0
        ends_B = self._query_start[1 : len(scheduled) + 1]
        if not logits_of_entry:
            drawn_R = ends_B[[entry.samples for entry in scheduled]] - 1
            self._logits_R[: len(drawn_R)] = drawn_R
            return
        for entry, rows, end in zip(scheduled, logits_of_entry, ends_B.tolist(), strict=True):
            wanted = [end - entry.num_tokens - entry.start + position for position in prompt_logprob_range(entry)]
            wanted.extend(end - entry.num_tokens - entry.start + position - 1 for position in entry.drawn_positions)
            self._logits_R[rows.start : rows.stop] = wanted

    def _take(self, count: int) -> Int32Array:
        view = self._memory[self._num_words : self._num_words + count]
        self._num_words += count
        return view
