"""Batch -> the tensors a forward pass reads, in buffers that are reused every step.

Shape legend: T rows of the step, B sequences, M blocks of the longest context.

The buffers have the size of the largest step and never move, so a GPU runner can pin them and capture
graphs over their device twins; a step uses a leading slice of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.batch import Batch, ScheduledSequence
from cluster.engine.kernels.ops import AttentionMetadata


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """Views of the buffers: valid until the next `build`."""

    token_ids_T: torch.Tensor  # int64; 0 where the token is still on the device
    metadata: AttentionMetadata
    logits_indices: torch.Tensor  # int64 rows whose logits are needed, ascending
    pending_rows: tuple[int, ...]  # rows whose token the launched step before has sampled

    def to(self, device: torch.device) -> ForwardInput:
        """On the device, where the model runs; itself on a CPU. The buffers may be reused at once."""
        if device.type == "cpu":
            return self
        metadata = self.metadata
        return ForwardInput(
            self.token_ids_T.to(device),
            AttentionMetadata(
                query_start=metadata.query_start.to(device),
                context_len=metadata.context_len.to(device),
                block_table=metadata.block_table.to(device),
                slot_mapping=metadata.slot_mapping.to(device),
                positions=metadata.positions.to(device),
                num_rows_max=metadata.num_rows_max,
                context_len_max=metadata.context_len_max,
            ),
            self.logits_indices.to(device),
            self.pending_rows,
        )


class ForwardBuffers:
    """Owned by one model runner."""

    def __init__(
        self, *, max_batched_tokens: int, max_num_sequences: int, max_num_blocks: int, block_size: int
    ) -> None:
        self._block_size = block_size
        self._token_ids_T = np.zeros(max_batched_tokens, np.int64)
        self._positions_T = np.zeros(max_batched_tokens, np.int64)
        self._slot_mapping_T = np.zeros(max_batched_tokens, np.int64)
        self._query_start = np.zeros(max_num_sequences + 1, np.int32)
        self._context_len_B = np.zeros(max_num_sequences, np.int32)
        self._block_table_BM = np.zeros((max_num_sequences, max_num_blocks), np.int32)

    def build(self, batch: Batch) -> ForwardInput:
        """Lay the batch's sequences end to end, in the batch's order."""
        scheduled = batch.scheduled
        num_sequences = len(scheduled)
        starts_B = np.fromiter((entry.start for entry in scheduled), np.int64, num_sequences)
        rows_B = np.fromiter((entry.num_tokens for entry in scheduled), np.int64, num_sequences)
        query_start = self._query_start[: num_sequences + 1]
        np.cumsum(rows_B, out=query_start[1:])
        np.add(starts_B, rows_B, out=self._context_len_B[:num_sequences], casting="unsafe")
        pending_rows = self._copy_tokens_and_tables(scheduled, query_start)
        num_rows = int(query_start[-1])
        self._fill_positions(starts_B, rows_B, query_start, num_rows)
        metadata = AttentionMetadata(
            query_start=torch.from_numpy(query_start),
            context_len=torch.from_numpy(self._context_len_B[:num_sequences]),
            block_table=torch.from_numpy(self._block_table_BM[:num_sequences]),
            slot_mapping=torch.from_numpy(self._slot_mapping_T[:num_rows]),
            positions=torch.from_numpy(self._positions_T[:num_rows]),
            num_rows_max=int(rows_B.max()),
            context_len_max=int(self._context_len_B[:num_sequences].max()),
        )
        indices = _logits_indices(scheduled, query_start)
        return ForwardInput(torch.from_numpy(self._token_ids_T[:num_rows]), metadata, indices, pending_rows)

    def _copy_tokens_and_tables(
        self, scheduled: tuple[ScheduledSequence, ...], query_start: npt.NDArray[np.int32]
    ) -> tuple[int, ...]:
        pending_rows: list[int] = []
        for index, entry in enumerate(scheduled):
            sequence, first = entry.sequence, int(query_start[index])
            assert sequence.table is not None
            # Views of the sequence's own arrays, gone before anything can grow them.
            blocks = np.frombuffer(sequence.table.block_ids, np.int32)
            self._block_table_BM[index, : len(blocks)] = blocks
            num_known = entry.num_tokens - entry.reads_pending_token - len(entry.drafts)
            tokens = np.frombuffer(sequence.token_ids, np.int32)[entry.start : entry.start + num_known]
            self._token_ids_T[first : first + num_known] = tokens
            if entry.reads_pending_token:
                self._token_ids_T[first + num_known] = 0
                pending_rows.append(first + num_known)
            if entry.drafts:  # never behind a pending token
                self._token_ids_T[first + num_known : first + entry.num_tokens] = entry.drafts
        return tuple(pending_rows)

    def _fill_positions(
        self,
        starts_B: npt.NDArray[np.int64],
        rows_B: npt.NDArray[np.int64],
        query_start: npt.NDArray[np.int32],
        num_rows: int,
    ) -> None:
        row_sequence_T = np.repeat(np.arange(len(rows_B)), rows_B)
        positions_T = self._positions_T[:num_rows]
        np.add(np.arange(num_rows), np.repeat(starts_B - query_start[:-1], rows_B), out=positions_T)
        blocks_T = self._block_table_BM[row_sequence_T, positions_T // self._block_size]
        np.add(
            blocks_T * np.int64(self._block_size), positions_T % self._block_size, out=self._slot_mapping_T[:num_rows]
        )


def prompt_logprob_range(entry: ScheduledSequence) -> range:
    """Positions of the entry's rows whose logits tell a prompt logprob that is still owed: the row of
    position p tells that of the prompt token p + 1."""
    sequence = entry.sequence
    if not sequence.wants_prompt_logprobs:
        return range(0)
    first = max(entry.start, len(sequence.prompt_logprobs) - 1)
    return range(first, min(entry.start + entry.num_tokens, sequence.prompt_length - 1))


def _logits_indices(scheduled: tuple[ScheduledSequence, ...], query_start: npt.NDArray[np.int32]) -> torch.Tensor:
    indices: list[int] = []
    for index, entry in enumerate(scheduled):
        offset = int(query_start[index]) - entry.start
        indices.extend(offset + position for position in prompt_logprob_range(entry))
        indices.extend(offset + position - 1 for position in entry.drawn_positions)
    return torch.tensor(indices, dtype=torch.int64)
