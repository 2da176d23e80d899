"""Batch -> tensors -> forward -> logits -> tokens.

`launch` queues a step on the device and returns at once; `collect` waits for its tokens. Between the
two, the next step may be launched: a sequence whose newest token the host has not seen yet takes it
from the launched step, on the device (`ScheduledSequence.reads_pending_token`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from cluster.engine.batch import Batch, DecodedTokens, DrawnRow, ScheduledSequence, StepResult
from cluster.engine.forward_input import ForwardBuffers, ForwardInput, prompt_logprob_range
from cluster.engine.kernels.ops import AttentionMetadata, Ops
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.sampling.logprobs import LogprobRows, logprob_rows
from cluster.engine.sampling.sampler import SampledRows, Sampler
from cluster.types import TokenLogprob


class ModelShape(Protocol):
    """What an engine must know of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def max_position(self) -> int:
        """The longest context, prompt and output together."""
        ...


class Model(Protocol):
    """What an engine runs; `models/llama.py` is the one there is."""

    @property
    def config(self) -> ModelShape: ...

    def kv_layout(self, block_size: int) -> KVLayout: ...

    def forward(
        self,
        token_ids_T: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        logits_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store K and V of all rows; fp32 logits (R, V) of the rows `logits_indices`."""
        ...


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt logprobs of one entry that a step computes; on the device."""

    entry_index: int
    rows: LogprobRows
    num_top: list[int]


class LaunchedStep(Protocol):
    """A step on its way; the rest is its runner's business."""

    @property
    def batch(self) -> Batch: ...


Launched = TypeVar("Launched", bound=LaunchedStep)


class Runner(Protocol[Launched]):
    """Runs one engine's steps in the order of their launch."""

    def launch(self, batch: Batch) -> Launched:
        """Queue a step; what it draws is known after `collect`."""
        ...

    def is_done(self, step: Launched) -> bool:
        """`collect` would not wait."""
        ...

    def collect(self, step: Launched) -> StepResult | DecodedTokens:
        """Wait for a launched step and bring its results to the host."""
        ...


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """`sampled_row_of` finds a sequence's first row in `sampled`, by identity."""

    batch: Batch
    sampled: SampledRows | None
    sampled_row_of: dict[int, int]
    prompts: tuple[PromptRows, ...]


class ModelRunner:
    """Runs one engine's steps in order. Owns the input buffers; the KV pool belongs to the engine."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        kv_cache: KVCache,
        *,
        device: torch.device,
        max_batched_tokens: int,
        max_num_sequences: int,
        max_blocks_per_sequence: int,
    ) -> None:
        self._model = model
        self._ops = ops
        self._kv_cache = kv_cache
        self._device = device
        self._sampler = Sampler(ops, device)
        self._previous: ComputedStep | None = None
        self._buffers = ForwardBuffers(
            max_batched_tokens=max_batched_tokens,
            max_num_sequences=max_num_sequences,
            max_num_blocks=max_blocks_per_sequence,
            block_size=kv_cache.layout.block_size,
        )

    @torch.inference_mode()
    def launch(self, batch: Batch) -> ComputedStep:
        """Steps are computed in the order of their launch."""
        forward_input = self._buffers.build(batch).to(self._device)
        self._fill_pending_tokens(batch, forward_input)
        logits_RV = self._model.forward(
            forward_input.token_ids_T, forward_input.metadata, self._kv_cache, forward_input.logits_indices
        )
        self._previous = self._sample(batch, logits_RV)
        return self._previous

    def is_done(self, step: ComputedStep) -> bool:
        return True

    @torch.inference_mode()
    def collect(self, step: ComputedStep) -> StepResult:
        """Wait for a launched step and bring its results to the host."""
        rows = step.sampled.to_host() if step.sampled is not None else []
        sampled = []
        for entry in step.batch.scheduled:
            first = step.sampled_row_of.get(id(entry.sequence), 0)
            sampled.append(tuple(rows[first : first + len(entry.drawn_positions)]))
        prompt_logprobs: list[tuple[TokenLogprob, ...]] = [()] * len(step.batch.scheduled)
        for prompt in step.prompts:
            prompt_logprobs[prompt.entry_index] = tuple(prompt.rows.to_host(prompt.num_top))
        return StepResult(tuple(sampled), tuple(prompt_logprobs))

    def _fill_pending_tokens(self, batch: Batch, forward_input: ForwardInput) -> None:
        if not forward_input.pending_rows:
            return
        assert self._previous is not None
        assert self._previous.sampled is not None
        places = [
            self._previous.sampled_row_of[id(entry.sequence)] for entry in batch.scheduled if entry.reads_pending_token
        ]
        tokens = self._previous.sampled.token_ids_R[torch.tensor(places, device=self._device)]
        forward_input.token_ids_T[torch.tensor(forward_input.pending_rows, device=self._device)] = tokens

    def _sample(self, batch: Batch, logits_RV: torch.Tensor) -> ComputedStep:
        """Rows of `logits_RV`, entry by entry: the prompt rows that are owed, then the sampled rows."""
        prompts: list[PromptRows] = []
        sampled_rows: list[int] = []
        drawn: list[DrawnRow] = []
        row_of: dict[int, int] = {}
        row = 0
        for index, entry in enumerate(batch.scheduled):
            num_owed = len(prompt_logprob_range(entry))
            if num_owed:
                prompts.append(self._prompt_rows(index, entry, logits_RV[row : row + num_owed]))
            row += num_owed
            if entry.samples:
                row_of[id(entry.sequence)] = len(drawn)
                sampled_rows.extend(range(row, row + len(entry.drawn_positions)))
                drawn.extend(DrawnRow(entry.sequence, position) for position in entry.drawn_positions)
                row += len(entry.drawn_positions)
        assert row == len(logits_RV)
        sampled = None
        if drawn:
            chosen_RV = logits_RV if not prompts else logits_RV[torch.tensor(sampled_rows, device=self._device)]
            sampled = self._sampler.sample(chosen_RV, drawn)
        return ComputedStep(batch, sampled, row_of, tuple(prompts))

    def _prompt_rows(self, index: int, entry: ScheduledSequence, logits_RV: torch.Tensor) -> PromptRows:
        asked = entry.sequence.request.sampling.prompt_logprobs
        assert asked is not None
        positions = prompt_logprob_range(entry)
        tokens = entry.sequence.token_ids[positions.start + 1 : positions.stop + 1]
        token_ids_R = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        return PromptRows(index, logprob_rows(self._ops, logits_RV, token_ids_R, asked), [asked] * len(positions))
