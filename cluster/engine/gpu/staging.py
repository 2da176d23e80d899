"""Batch -> the tensors of a step on the device: one copy from pinned memory, one kernel that lays it out.

    pinned int32    query_start B+1 | context_len B | logits R | token T | source T | position T | slot T | table B*M
        | one copy
    device int32    the same
        | unpack_kernel: widens, takes tokens that only the device knows from the step before
    static tensors  what the model reads; they never move, so graphs can be captured over them

Shape legend: T rows, B sequences, R rows of logits, all padded; M block table columns in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.batch import Batch, ScheduledSequence
from cluster.engine.forward_input import prompt_logprob_range
from cluster.engine.gpu.block_rows import BlockRows
from cluster.engine.gpu.host_copy import Moment, pinned_zeros
from cluster.engine.gpu.shapes import MANY_ROWS, StepShape, padded_sizes, round_up, rows_class
from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton.plans import SPLIT_KEYS
from cluster.engine.kernels.triton.step import unpack_step

_Int32 = npt.NDArray[np.int32]
NUM_BUFFERS = 3  # steps whose host side may be alive: one that runs, one that is queued, one that is built


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step whose tensors are (or will be, in stream order) on the device."""

    shape: StepShape
    num_rows: int  # without padding
    is_decode: bool  # `Batch.is_decode`: each entry has the row of logits of its own number
    logits_of_entry: tuple[range, ...]  # else the rows of each entry: prompt rows that are owed, then the drawn ones


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    is_free: Moment


class StepStaging:
    """Owns the static tensors and the pinned buffers. `tokens_R` is the runner's: what each row of the last
    launched step drew."""

    def __init__(
        self,
        device: torch.device,
        *,
        max_rows: int,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self.sequence_sizes = padded_sizes(max_sequences)
        # With every size of the other list, so that a decode step has one padding for both.
        self.row_sizes = tuple(sorted({*padded_sizes(max_rows), *self.sequence_sizes}))
        self._block_size = block_size
        self._blocks = BlockRows(2 * max_sequences, max_blocks)
        capacity = 4 * max_rows + max_rows + 2 * max_sequences + 1 + max_sequences * max_blocks
        self._buffers = [_Buffer(pinned_zeros(capacity, device), Moment(device)) for _ in range(NUM_BUFFERS)]
        self._turn = 0
        self._packed = torch.zeros(capacity, dtype=torch.int32, device=device)

        def static(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids_T = static(max_rows)
        self.positions_T = static(max_rows)
        self.slot_mapping_T = static(max_rows)
        self.logits_R = static(max_rows)
        self.query_start = static(max_sequences + 1, dtype=torch.int32)
        self.context_len_B = static(max_sequences, dtype=torch.int32)
        self.block_table_BM = static(max_sequences, max_blocks, dtype=torch.int32)

    def metadata(self, shape: StepShape, context_len_max: int, num_keys_max: int) -> AttentionMetadata:
        """Views of the static tensors, for a step of that shape. The two bounds size grids and scratch."""
        return AttentionMetadata(
            query_start=self.query_start[: shape.num_sequences + 1],
            context_len=self.context_len_B[: shape.num_sequences],
            block_table=self.block_table_BM[: shape.num_sequences],
            slot_mapping=self.slot_mapping_T[: shape.num_rows],
            positions=self.positions_T[: shape.num_rows],
            num_rows_max=shape.num_rows_max,
            num_rows_min=shape.num_rows_min,
            context_len_max=context_len_max,
            num_keys_max=num_keys_max,
        )

    def stage(self, batch: Batch, row_drawn: dict[int, int], drawn_R: torch.Tensor) -> tuple[StagedStep, int, int]:
        """Queue the batch's tensors on the current stream. `row_drawn` finds the row of `drawn_R` that holds a
        sequence's newest token, by identity. Returns the step, its longest context and the sum of contexts."""
        scheduled = batch.scheduled
        buffer = self._next_buffer()
        rows_B = np.fromiter((entry.num_tokens for entry in scheduled), np.int32, len(scheduled))
        starts_B = np.fromiter((entry.start for entry in scheduled), np.int32, len(scheduled))
        is_decode = batch.is_decode
        logits_of_entry = () if is_decode else tuple(_logits_rows(scheduled))
        num_logits = logits_of_entry[-1].stop if logits_of_entry else len(scheduled)
        num_rows, contexts_B = int(rows_B.sum()), starts_B + rows_B
        rows_max = rows_class(int(rows_B.max()))
        shape = StepShape(
            num_rows=round_up(num_rows, self.row_sizes),
            num_sequences=round_up(len(scheduled), self.sequence_sizes),
            num_logits=round_up(num_logits, self.row_sizes),
            num_rows_max=rows_max,
            has_many_splits=int(contexts_B.max()) > SPLIT_KEYS,
            num_rows_min=2 if rows_max == MANY_ROWS and int(rows_B.min()) > 1 else 1,
        )
        if shape.num_rows_max == 1:  # every sequence has one row: one padding serves both
            shape = _decode_shape(shape)
        packer = _Packer(buffer.memory.numpy(), shape)
        packer.fill(scheduled, rows_B, starts_B, contexts_B, logits_of_entry, row_drawn)
        table_BM = self._blocks.gather(scheduled)
        packer.fill_slots(table_BM, self._block_size)
        size = packer.append_table(table_BM)
        self._packed[:size].copy_(buffer.memory[:size], non_blocking=True)
        buffer.is_free.record()
        unpack_step(
            self._packed, drawn_R, self.token_ids_T, self.positions_T, self.slot_mapping_T, self.logits_R,
            self.query_start, self.context_len_B, self.block_table_BM,
            num_rows=shape.num_rows, num_sequences=shape.num_sequences, num_logits=shape.num_logits,
            num_columns=table_BM.shape[1],
        )  # fmt: skip
        return StagedStep(shape, num_rows, is_decode, logits_of_entry), int(contexts_B.max()), int(contexts_B.sum())

    def _next_buffer(self) -> _Buffer:
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.is_free.wait()  # its copy was queued three steps ago
        return buffer


def _decode_shape(shape: StepShape) -> StepShape:
    size = max(shape.num_rows, shape.num_sequences)
    logits = size if shape.num_logits <= size else shape.num_logits
    return StepShape(size, size, logits, 1, shape.has_many_splits)


def _logits_rows(scheduled: tuple[ScheduledSequence, ...]) -> Iterator[range]:
    start = 0
    for entry in scheduled:
        stop = start + len(prompt_logprob_range(entry)) + entry.num_drawn
        yield range(start, stop)
        start = stop


class _Packer:
    """Fills one pinned buffer, in the order of the legend above."""

    def __init__(self, memory: _Int32, shape: StepShape) -> None:
        self._memory, self._shape = memory, shape
        self._place = 0
        self._query_start = self._take(shape.num_sequences + 1)
        self._context_B = self._take(shape.num_sequences)
        self._logits_R = self._take(shape.num_logits)
        self._token_T = self._take(shape.num_rows)
        self._source_T = self._take(shape.num_rows)
        self._position_T = self._take(shape.num_rows)
        self._slot_T = self._take(shape.num_rows)

    def fill(
        self,
        scheduled: tuple[ScheduledSequence, ...],
        rows_B: _Int32,
        starts_B: _Int32,
        contexts_B: _Int32,
        logits_of_entry: tuple[range, ...],
        row_drawn: dict[int, int],
    ) -> None:
        num_sequences, num_rows = len(scheduled), int(rows_B.sum())
        self._query_start[0] = 0
        np.cumsum(rows_B, out=self._query_start[1 : num_sequences + 1])
        self._query_start[num_sequences + 1 :] = num_rows
        self._context_B[:num_sequences] = contexts_B
        self._context_B[num_sequences:] = 1
        self._token_T[:] = 0
        self._source_T[:] = -1
        self._row_sequence = np.repeat(np.arange(num_sequences), rows_B)
        self._position_T[num_rows:] = 0
        offsets_B = starts_B - self._query_start[:num_sequences]
        np.add(np.arange(num_rows, dtype=np.int32), offsets_B[self._row_sequence], out=self._position_T[:num_rows])
        self._copy_tokens(scheduled, row_drawn)
        self._fill_logits(scheduled, logits_of_entry)

    def _copy_tokens(self, scheduled: tuple[ScheduledSequence, ...], row_drawn: dict[int, int]) -> None:
        if all(entry.reads_pending_token and entry.num_tokens == 1 for entry in scheduled):
            self._source_T[: len(scheduled)] = [row_drawn[id(entry.sequence)] for entry in scheduled]
            return
        place = 0
        for entry in scheduled:
            end = stop = place + entry.num_tokens
            if entry.drafts:  # never behind a pending token
                stop -= len(entry.drafts)
                self._token_T[stop:end] = entry.drafts
            if entry.reads_pending_token:
                self._source_T[stop - 1] = row_drawn[id(entry.sequence)]
                stop -= 1
            if stop > place:
                first = entry.start
                # A view of the sequence's own array, gone before anything can grow it.
                self._token_T[place:stop] = np.frombuffer(entry.sequence.token_ids, np.int32)[
                    first : first + stop - place
                ]
            place = end

    def _fill_logits(self, scheduled: tuple[ScheduledSequence, ...], logits_of_entry: tuple[range, ...]) -> None:
        self._logits_R[:] = 0
        ends_B = self._query_start[1 : len(scheduled) + 1]
        if not logits_of_entry:
            self._logits_R[: len(scheduled)] = ends_B - 1
            return
        for entry, rows, end in zip(scheduled, logits_of_entry, ends_B.tolist(), strict=True):
            wanted = [end - entry.num_tokens - entry.start + position for position in prompt_logprob_range(entry)]
            wanted.extend(end - entry.num_tokens - entry.start + position - 1 for position in entry.drawn_positions)
            self._logits_R[rows.start : rows.stop] = wanted

    def fill_slots(self, table_BM: _Int32, block_size: int) -> None:
        num_rows = len(self._row_sequence)
        position_T = self._position_T[:num_rows]
        blocks_T = table_BM[self._row_sequence, position_T // block_size]
        np.add(blocks_T * block_size, position_T % block_size, out=self._slot_T[:num_rows])
        self._slot_T[num_rows:] = -1

    def append_table(self, table_BM: _Int32) -> int:
        """Returns the number of words in use."""
        num_sequences, columns = table_BM.shape
        target = self._take(self._shape.num_sequences * columns).reshape(-1, columns)
        target[:num_sequences] = table_BM
        target[num_sequences:] = 0
        return self._place

    def _take(self, count: int) -> _Int32:
        view = self._memory[self._place : self._place + count]
        self._place += count
        return view
