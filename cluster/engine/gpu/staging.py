"""Batch -> the tensors of a step on the device: one kernel, which reads pinned memory in place.

    pinned int32    query_start B+1 | context_len B | logits R | token T | source T | position T | slot T | table B*M
        | unpack_kernel: widens, takes tokens that only the device knows from the step before
    static tensors  what the model reads; they never move, so graphs can be captured over them

Shape legend: T rows, B sequences, R rows of logits, all padded; M block table columns in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.batch import Batch
from cluster.engine.forward_input import prompt_logprob_range
from cluster.engine.gpu.block_rows import BlockRows
from cluster.engine.gpu.host_copy import NUM_BUFFERS, Moment, pinned_zeros
from cluster.engine.gpu.prompt_shapes import PromptShapes
from cluster.engine.gpu.shapes import MANY_ROWS, StepShape, padded_sizes, round_up, rows_class
from cluster.engine.gpu.step_words import Int32Array, StepBounds, StepWords
from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton.plans import SPLIT_KEYS
from cluster.engine.kernels.triton.step import unpack_step


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step whose tensors are (or will be, in stream order) on the device."""

    shape: StepShape
    # The rows of each entry: prompt rows that are owed, then the drawn ones. Empty: one row for each that samples.
    logits_of_entry: tuple[range, ...]


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    words: Int32Array  # the same memory
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
        graph_prompt_rows: int = 0,
    ) -> None:
        self.sequence_sizes = padded_sizes(max_sequences)
        # With every size of the other list, so that a decode step has one padding for both.
        self.row_sizes = tuple(sorted({*padded_sizes(max_rows), *self.sequence_sizes}))
        self.prompt_shapes: PromptShapes | None = None
        if graph_prompt_rows:
            has_many_splits = max_blocks * block_size > SPLIT_KEYS
            sizes = self.row_sizes, self.sequence_sizes
            self.prompt_shapes = PromptShapes(graph_prompt_rows, *sizes, has_many_splits=has_many_splits)
        self._blocks = BlockRows(2 * max_sequences, max_blocks, block_size)
        num_words = 4 * max_rows + max_rows + 2 * max_sequences + 1
        capacity = num_words + max_sequences * max_blocks
        self._memory = np.zeros(num_words, np.int32)  # of the words, from which a buffer is filled
        self._words: StepWords | None = None  # of the step before
        pinned = [pinned_zeros(capacity, device) for _ in range(NUM_BUFFERS)]
        self._buffers = [_Buffer(memory, memory.numpy(), Moment(device)) for memory in pinned]
        self._turn = 0

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
            num_prompts_max=shape.num_prompts_max,
        )

    def stage(self, batch: Batch, row_drawn: dict[int, int], drawn_R: torch.Tensor) -> tuple[StagedStep, int, int]:
        """Queue the batch's tensors on the current stream. `row_drawn` finds the row of `drawn_R` that holds a
        sequence's newest token, by identity. Returns the step, its longest context and the sum of contexts."""
        logits_of_entry = _logits_rows(batch)
        if self._words is not None and self._words.is_followed_by(batch):
            self._words.move_on(batch)
        else:
            self._words = self._lay_out(batch, logits_of_entry, row_drawn)
        buffer, bounds = self._next_buffer(), self._words.bounds
        num_columns = self._words.copy_to(buffer.words)
        shape = bounds.shape
        unpack_step(
            buffer.memory, drawn_R, self.token_ids_T, self.positions_T, self.slot_mapping_T, self.logits_R,
            self.query_start, self.context_len_B, self.block_table_BM,
            num_rows=shape.num_rows, num_sequences=shape.num_sequences, num_logits=shape.num_logits,
            num_columns=num_columns,
        )  # fmt: skip
        buffer.is_free.record()
        return StagedStep(shape, logits_of_entry), bounds.longest, bounds.num_keys

    def _lay_out(self, batch: Batch, logits_of_entry: tuple[range, ...], row_drawn: dict[int, int]) -> StepWords:
        scheduled = batch.scheduled
        rows_B = np.fromiter([entry.num_tokens for entry in scheduled], np.int32, len(scheduled))
        starts_B = np.fromiter([entry.start for entry in scheduled], np.int32, len(scheduled))
        num_logits = logits_of_entry[-1].stop if logits_of_entry else sum([entry.samples for entry in scheduled])
        contexts_B = starts_B + rows_B
        longest = int(contexts_B.max())
        rows_max = rows_class(int(rows_B.max()))
        shape = StepShape(
            num_rows=round_up(batch.num_tokens, self.row_sizes),
            num_sequences=round_up(len(scheduled), self.sequence_sizes),
            num_logits=round_up(num_logits, self.row_sizes),
            num_rows_max=rows_max,
            has_many_splits=longest > SPLIT_KEYS,
            num_rows_min=2 if rows_max == MANY_ROWS and int(rows_B.min()) > 1 else 1,
        )
        if shape.num_rows_max == 1:  # every sequence has one row: one padding serves both
            shape = _decode_shape(shape)
        elif self.prompt_shapes is not None and num_logits == sum([entry.samples for entry in scheduled]):
            num_prompts = int((rows_B > 1).sum())  # and here are neither drafts nor logprobs of a prompt
            shape = self.prompt_shapes.of(batch.num_tokens, len(scheduled), num_prompts, num_logits) or shape
        words = StepWords(self._memory, batch, StepBounds(shape, longest, int(contexts_B.sum())))
        words.lay_out(rows_B, starts_B, logits_of_entry, row_drawn, self._blocks)
        return words

    def _next_buffer(self) -> _Buffer:
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.is_free.wait()  # its reader was queued three steps ago
        return buffer


def _decode_shape(shape: StepShape) -> StepShape:
    size = max(shape.num_rows, shape.num_sequences)
    logits = size if shape.num_logits <= size else shape.num_logits
    return StepShape(size, size, logits, 1, shape.has_many_splits)


def _logits_rows(batch: Batch) -> tuple[range, ...]:
    if batch.cohort is not None or not any(
        entry.drafts or entry.sequence.wants_prompt_logprobs for entry in batch.scheduled
    ):
        return ()
    ranges, start = [], 0
    for entry in batch.scheduled:
        stop = start + len(prompt_logprob_range(entry)) + entry.num_drawn
        ranges.append(range(start, stop))
        start = stop
    return tuple(ranges)
