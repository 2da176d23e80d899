"""Runs an engine's steps on a CUDA device, one step ahead of the host.

    launch(n+1): stage, forward (a graph where there is one), sample, tell the host, record an event
    collect(n):  wait for n's event, while n+1 runs; n+2 is launched after it

Nothing between a step and the next waits for the device: drawn tokens stay there for the next step, and
the host finds them in pinned memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cluster.engine.batch import Batch, DecodedTokens, ScheduledSequence, StepResult
from cluster.engine.forward_input import prompt_logprob_range
from cluster.engine.gpu.draws import DrawRows, Draws
from cluster.engine.gpu.graphs import GraphStore, HiddenRows, StepOutput
from cluster.engine.gpu.host_copy import NUM_BUFFERS, Moment
from cluster.engine.gpu.model import GpuModel
from cluster.engine.gpu.prompt_graphs import PromptGraphs
from cluster.engine.gpu.results import PromptRows, step_result
from cluster.engine.gpu.sampler import DrawnRows, GpuSampler, HostLogprobs, RowStats, logprob_rows
from cluster.engine.gpu.shapes import FEW_ROWS, MANY_ROWS, StepShape, round_up
from cluster.engine.gpu.staging import StagedStep, StepStaging
from cluster.engine.host_values import to_device
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import SPLIT_KEYS
from cluster.engine.kv_cache import KVCache

logger = logging.getLogger(__name__)

_DRAFTING_SEQUENCES = (1, 2, 4, 8)  # speculation pays where few run: their verification replays graphs, too
_LOGIT_ROWS_AT_ONCE = 512  # of prompts whose logprobs are wanted: bounds the memory of the logits


@dataclass(frozen=True, slots=True)
class LaunchedGpuStep:
    """A step on its way."""

    batch: Batch
    drawn: DrawnRows | None
    prompts: list[PromptRows]
    is_done: Moment


class GpuModelRunner:
    """A `ModelRunner` (engine.py) for a CUDA device. Owns staging, graphs and the tokens drawn last; the KV
    pool belongs to the engine. `use_graphs` False: every step is launched kernel by kernel. Steps with prompts are,
    if they have more than `graph_prompt_rows` rows. `max_uncollected`: steps that draw tokens and are launched before
    the first of them is collected. `max_pool_keys`: to be measured with, of a pool that is yet to be sized."""

    def __init__(
        self,
        model: GpuModel,
        ops: CudaOps,
        kv_cache: KVCache,
        *,
        device: torch.device,
        max_batched_tokens: int,
        max_num_sequences: int,
        max_model_len: int,
        max_drafts: int = 0,
        use_graphs: bool = True,
        graph_prompt_rows: int = 0,
        max_uncollected: int = NUM_BUFFERS - 1,
        max_pool_keys: int | None = None,
    ) -> None:
        self._model = model
        self._ops = ops
        self._kv_cache = kv_cache
        self._device = device
        self._max_model_len = max_model_len
        block_size = kv_cache.layout.block_size
        self._staging = StepStaging(
            device,
            max_rows=max_batched_tokens,
            max_sequences=max_num_sequences,
            max_blocks=-(-max_model_len // block_size),
            block_size=block_size,
            graph_prompt_rows=graph_prompt_rows if use_graphs else 0,
        )
        # Where many contexts are longer than a split, their partial results are bounded by what the pool holds.
        self._max_pool_keys = max_pool_keys or kv_cache.num_blocks * block_size
        self._max_drafts = max_drafts
        max_drawn = min(max_num_sequences * (1 + max_drafts), max_batched_tokens)
        self._tokens_R = torch.zeros(max_drawn, dtype=torch.int64, device=device)
        self._draw_rows = DrawRows()
        self._sampler = GpuSampler(ops, max_drawn, max_uncollected + 1)
        self._graphs: GraphStore[StepOutput] | None = None
        self.prompt_graphs: PromptGraphs | None = None
        if use_graphs:
            pool = torch.cuda.graph_pool_handle()
            self._graphs = GraphStore(pool)
            if self._staging.prompt_shapes is not None:
                self.prompt_graphs = PromptGraphs(GraphStore(pool), self._staging.prompt_shapes, device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> LaunchedGpuStep:
        """Steps are computed in the order of their launch."""
        with (
            torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        ):  # whatever thread this is
            return self._launch(batch)

    def _launch(self, batch: Batch) -> LaunchedGpuStep:
        staged, longest, num_keys = self._staging.stage(batch, self._draw_rows.row_of, self._tokens_R)
        prompts: list[PromptRows] = []
        draws = self._draw_rows.of(batch)
        if staged.logits_of_entry and staged.logits_of_entry[-1].stop > len(draws):
            output = self._forward_with_prompts(staged, batch, longest, num_keys, prompts)
        else:
            output = self._forward(staged.shape, longest, num_keys)
        drawn = self._sample(output, draws) if len(draws) else None
        is_done = Moment(self._device)
        is_done.record()
        return LaunchedGpuStep(batch, drawn, prompts, is_done)

    def is_done(self, step: LaunchedGpuStep) -> bool:
        return step.is_done.is_past()

    def collect(self, step: LaunchedGpuStep) -> StepResult | DecodedTokens:
        """Wait for a launched step and bring its results to the host."""
        step.is_done.wait()
        return step_result(step.batch, step.drawn, step.prompts)

    # ---- start

    def warm_up(self) -> None:
        """Compile every kernel that a step may need, capture the graphs. Products of the library that were not
        compared before are compared now."""
        self.compile_all()
        if self._graphs is not None:
            self._capture(self._graphs)
            logger.info("%d graphs captured", len(self._graphs))
        self.capture_prompts()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def capture_prompts(self) -> None:
        """The graphs of steps with prompts, if there are to be any."""
        if self.prompt_graphs is not None:
            self._stage_padding()
            self.prompt_graphs.capture(self._hidden_rows)

    @torch.inference_mode()
    def expected_prompt_graph_bytes(self) -> int:
        """Of a runner like this one over the pool that is yet to be sized."""
        if self.prompt_graphs is None:
            return 0
        self._stage_padding()
        return self.prompt_graphs.expected_bytes(self._hidden_rows)

    def _hidden_rows(self, shape: StepShape) -> HiddenRows:
        """For a graph: of as many rows as can be drawn from, the first of `logits_R`. Behind those of a step stands
        what an earlier one left there; it may be more than this one has rows."""
        rows_R = self._staging.logits_R[: min(shape.num_sequences, shape.num_rows)].clamp(max=shape.num_rows - 1)
        return HiddenRows(self._hidden(shape, *self._bounds(shape), rows_R))

    def compile_all(self) -> None:
        """`compile` for all sizes that steps of this runner can have."""
        most = max(len(self._tokens_R), _LOGIT_ROWS_AT_ONCE)
        self.compile(self._staging.row_sizes, [size for size in self._staging.row_sizes if size <= most])

    @torch.inference_mode()
    def compile(self, row_sizes: Sequence[int], logits_sizes: Sequence[int]) -> None:
        """Use what steps of these sizes use, on steps of padding."""
        self._model.warm_up(row_sizes, logits_sizes)
        for size in self._staging.sequence_sizes:
            for num_rows_max in (1, FEW_ROWS, MANY_ROWS):
                shape = StepShape(size, size, size, num_rows_max, has_many_splits=False)
                self._stage_padding()
                self._forward_eagerly(shape, *self._bounds(shape))
        torch.cuda.synchronize()

    @torch.inference_mode()
    def _capture(self, graphs: GraphStore[StepOutput]) -> None:
        kinds = (True, False) if self._max_model_len > SPLIT_KEYS else (False,)
        for has_many_splits in kinds:
            for shape in self._graph_shapes(has_many_splits):
                self._stage_padding()
                self._forward_eagerly(shape, *self._bounds(shape))
                graphs.capture(shape, partial(self._forward_eagerly, shape, *self._bounds(shape)))
        torch.cuda.synchronize()

    def _graph_shapes(self, has_many_splits: bool) -> list[StepShape]:
        """Steps of one row per sequence; few sequences with drafts. Largest first."""
        staging = self._staging
        shapes = [StepShape(size, size, size, 1, has_many_splits) for size in staging.sequence_sizes]
        for count in _DRAFTING_SEQUENCES if self._max_drafts else ():
            most = min(count * (1 + self._max_drafts), staging.row_sizes[-1])
            shapes += [
                StepShape(rows, count, rows, FEW_ROWS, has_many_splits)
                for rows in staging.row_sizes
                if count in staging.sequence_sizes and count < rows <= round_up(most, staging.row_sizes)
            ]
        return sorted(shapes, key=lambda shape: shape.num_rows, reverse=True)

    def _bounds(self, shape: StepShape) -> tuple[int, int]:
        """The longest context and the sum of contexts that a graph of this shape is made for."""
        longest = self._max_model_len if shape.has_many_splits else min(SPLIT_KEYS, self._max_model_len)
        return longest, min(self._max_pool_keys, shape.num_sequences * longest)

    @torch.inference_mode()
    def run_largest(self) -> None:
        """One step as large as any, of padding: what it allocates at its peak is what steps need. Its logits are as
        many as any step has, processed, and told with logprobs of chosen rows, which are a third copy."""
        sizes = self._staging.row_sizes, self._staging.sequence_sizes
        num_logits = max(len(self._tokens_R), min(_LOGIT_ROWS_AT_ONCE, sizes[0][-1]))
        shape = StepShape(sizes[0][-1], sizes[1][-1], num_logits, MANY_ROWS, self._max_model_len > SPLIT_KEYS)
        self._stage_padding()
        hidden_TK = self._hidden(shape, self._max_model_len, self._max_pool_keys)  # of all: a prompt's logprobs
        indices_R = torch.zeros(round_up(num_logits, sizes[0]), dtype=torch.int64, device=self._device)
        output = self._output(self._model.logits(hidden_TK, indices_R))
        processed_RV = output.logits_RV.clone()
        logprob_rows(output.logits_RV[indices_R], output.stats.logsumexp_R, indices_R, num_top=1)
        del processed_RV  # not before: a step has all three

    def _stage_padding(self) -> None:
        staging = self._staging
        staging.query_start.zero_()
        staging.context_len_B.fill_(1)
        staging.slot_mapping_T.fill_(-1)
        staging.positions_T.zero_()
        staging.token_ids_T.zero_()
        staging.logits_R.zero_()
        staging.block_table_BM.zero_()

    # ---- a step

    def _forward(self, shape: StepShape, longest: int, num_keys: int) -> StepOutput:
        if (
            self._graphs is not None and num_keys <= self._max_pool_keys
        ):  # else prefixes are shared by many: more splits than were captured
            output = self._graphs.replay(shape)
            if output is not None:
                return output
            rows = None if self.prompt_graphs is None else self.prompt_graphs.replay(shape)
            if rows is not None:
                return self._output(self._model.logits(rows.hidden_RK[: shape.num_logits]))
        return self._forward_eagerly(shape, longest, num_keys)

    def _forward_eagerly(self, shape: StepShape, longest: int, num_keys: int) -> StepOutput:
        logits_R = self._staging.logits_R[: shape.num_logits]
        if shape.num_logits < shape.num_rows:
            return self._output(self._model.logits(self._hidden(shape, longest, num_keys, logits_R)))
        return self._output(self._model.logits(self._hidden(shape, longest, num_keys), logits_R))

    def _hidden(
        self, shape: StepShape, longest: int, num_keys: int, rows_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        staging = self._staging
        metadata = staging.metadata(shape, longest, num_keys)
        return self._model.hidden(staging.token_ids_T[: shape.num_rows], metadata, self._kv_cache, rows_R)

    def _output(self, logits_RV: torch.Tensor) -> StepOutput:
        return StepOutput(logits_RV, RowStats(*self._ops.vocab_stats(logits_RV)))

    def _forward_with_prompts(
        self, staged: StagedStep, batch: Batch, longest: int, num_keys: int, prompts: list[PromptRows]
    ) -> StepOutput:
        """Logits of prompt rows are made, reduced to logprobs and dropped, some rows at a time."""
        hidden_TK = self._hidden(staged.shape, longest, num_keys)
        sampled_rows: list[int] = []
        entries = zip(staged.logits_of_entry, batch.scheduled, strict=True)
        for index, (rows, entry) in enumerate(entries):
            drawn_rows = range(rows.stop - len(entry.drawn_positions), rows.stop)
            positions = prompt_logprob_range(entry) if drawn_rows.start > rows.start else range(0)
            asked = entry.sequence.request.sampling.prompt_logprobs
            if positions and asked is not None:
                parts = self._prompt_parts(hidden_TK, rows.start, positions, entry, asked)
                prompts.append(PromptRows(index, asked, parts))
            sampled_rows.extend(drawn_rows)
        padding = [0] * (round_up(len(sampled_rows), self._staging.row_sizes) - len(sampled_rows))
        places_R = to_device(np.asarray(sampled_rows + padding, np.int64), self._device)
        return self._output(self._model.logits(hidden_TK, self._staging.logits_R[places_R]))

    def _prompt_parts(
        self, hidden_TK: torch.Tensor, first_row: int, positions: range, entry: ScheduledSequence, asked: int
    ) -> list[HostLogprobs]:
        parts = []
        for start in range(0, len(positions), _LOGIT_ROWS_AT_ONCE):
            part = positions[start : start + _LOGIT_ROWS_AT_ONCE]
            count = len(part)
            indices_R = torch.zeros(round_up(count, self._staging.row_sizes), dtype=torch.int64, device=self._device)
            indices_R[:count] = self._staging.logits_R[first_row + start : first_row + start + count]
            output = self._output(self._model.logits(hidden_TK, indices_R))
            told = entry.sequence.token_ids[part.start + 1 : part.stop + 1]
            stats = output.stats.rows(0, count)
            parts.append(self._sampler.prompt_logprobs(output.logits_RV[:count], stats, told, asked))
        return parts

    def _sample(self, output: StepOutput, draws: Draws) -> DrawnRows:
        """The first rows of the output are those of `draws`; padding follows."""
        count = len(draws)
        return self._sampler.sample(
            output.logits_RV[:count], output.stats.rows(0, count), draws, self._tokens_R[:count]
        )
