"""Trials (`plan_admission.py`) of latent attention, on caches of `attention_trials.py`, and of products per head."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.plan_admission import MAX_COMPARED_ROWS, rows_scope
from cluster.engine.kernels.triton import latent_launch
from cluster.engine.kernels.triton.attention_trials import AttentionCase, AttentionInputs, prefill_fields
from cluster.engine.kernels.triton.plans import REFERENCE_LATENT, REFERENCE_LINEAR, LatentPlan, LinearPlan
from cluster.engine.kernels.triton.trials import draw_rows


@dataclass(frozen=True, slots=True)
class LatentTrial:
    """`run`: q, rotated q, one layer's cache, metadata, as they are served. Results are compared with those of the
    tiled kernel in its plainest form."""

    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata, LatentPlan], torch.Tensor]
    wanted: LatentPlan
    case: AttentionCase  # of one KV head, whose rows are a latent part and a rotated one
    latent_size: int

    @property
    def subject(self) -> str:
        return f"latent {self.case.subject}"

    @property
    def others(self) -> Sequence[LatentPlan]:
        """Only the part of this path changes: the other one has a verdict of its own."""
        if not self.case.split_rows:
            return (msgspec.structs.replace(self.wanted, **prefill_fields(REFERENCE_LATENT)),)
        one_stage = msgspec.structs.replace(self.wanted, split_num_stages=1)
        return one_stage, msgspec.structs.replace(self.wanted, few_rows_kind="tiled")

    def scope(self, plan: LatentPlan) -> Hashable:
        return "latent", self.latent_size, self.case.scope

    def draw(self, seed: int, plan: LatentPlan) -> AttentionInputs:
        return self.case.draw(seed)

    def expected(self, inputs: AttentionInputs) -> list[torch.Tensor]:
        return [self._result(inputs, inputs.unpadded, REFERENCE_LATENT)]

    def found(self, inputs: AttentionInputs, plan: LatentPlan) -> list[torch.Tensor]:
        return [self._result(inputs, inputs.metadata, plan)]

    def _result(self, inputs: AttentionInputs, metadata: AttentionMetadata, plan: LatentPlan) -> torch.Tensor:
        q, q_rope = inputs.q_THD.split([self.latent_size, inputs.q_THD.shape[2] - self.latent_size], dim=2)
        return self.run(q.contiguous(), q_rope.contiguous(), inputs.kv_N2GSD[:, 1:], metadata, plan)


@dataclass(frozen=True, slots=True)
class HeadTrial:
    """A product per head. `run`: rows, as they are served."""

    run: Callable[[torch.Tensor, LinearPlan], torch.Tensor]
    weight_HNK: torch.Tensor
    num_rows: int

    @property
    def subject(self) -> str:
        num_heads, outputs, inputs = self.weight_HNK.shape
        return f"linear of {num_heads} heads, {outputs} x {inputs}, {self.num_rows} rows"

    @property
    def others(self) -> Sequence[LinearPlan]:
        return (REFERENCE_LINEAR,)

    def scope(self, plan: LinearPlan) -> Hashable:
        return "heads", self.weight_HNK.shape, self.weight_HNK.dtype, rows_scope(self.num_rows)

    def draw(self, seed: int, plan: LinearPlan) -> torch.Tensor:
        """(T, H, K)."""
        num_heads, _, inputs = self.weight_HNK.shape
        count = min(self.num_rows, MAX_COMPARED_ROWS)
        return draw_rows(seed, count * num_heads, inputs, self.weight_HNK).view(count, num_heads, inputs)

    def expected(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [latent_launch.run_head_linear(inputs, self.weight_HNK, REFERENCE_LINEAR)]

    def found(self, inputs: torch.Tensor, plan: LinearPlan) -> list[torch.Tensor]:
        return [self.run(inputs, plan)]
