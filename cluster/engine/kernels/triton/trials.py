"""Trials (`plan_admission.py`) of the GEMMs and of the experts' GEMMs, on the weights that they will serve.

Rows are seeded, and neighbouring columns nearly cancel. Weights are the model's, so nothing large is made, and
the order of a sum shows in about one of 10,000 results rounded to bf16, and in most fp32 ones: hence the number of
values that are compared. The others must have been written: a library left tiles out on a share of a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from cluster.engine.kernels.plan_admission import MAX_COMPARED_ROWS, rows_scope
from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.moe_plans import REFERENCE_MOE, MoePlan, MoeShape, unmeasured_moe_plan
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, LinearPlan
from cluster.engine.kernels.triton.table import plan_without_library, unmeasured_plan

_MAX_COMPARED_OUTPUTS = 4096  # columns: first and last ones, where tiles begin and end


def draw_rows(seed: int, num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    """(num_rows, num_columns) of the type and on the device of `like`."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    x_TK = torch.randn((num_rows, num_columns), generator=generator, device=like.device, dtype=torch.float32)
    x_TK[:, 1::2] -= x_TK[:, ::2][:, : x_TK[:, 1::2].shape[1]] * 0.99
    return x_TK.to(like.dtype)


@dataclass(frozen=True, slots=True)
class LinearTrial:
    """A product, or SwiGLU with W = [gate; up]. `run`: x and a result to be filled, as they are served.

    A library picks its algorithm by shape: a verdict on it is for one number of rows."""

    run: Callable[[torch.Tensor, torch.Tensor, LinearPlan], None]
    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None
    num_rows: int
    out_dtype: torch.dtype
    silu_mul: bool

    @property
    def subject(self) -> str:
        kind = ", SwiGLU" if self.silu_mul else ", with a bias" if self.bias_N is not None else ""
        return f"linear {self._out_features} x {self.weight_NK.shape[1]}, {self.num_rows} rows{kind}"

    @property
    def others(self) -> Sequence[LinearPlan]:
        own = plan_without_library(self.num_rows), unmeasured_plan(self.num_rows)
        return *dict.fromkeys(own), REFERENCE_LINEAR

    def scope(self, plan: LinearPlan) -> Hashable:
        rows = self.num_rows if plan.kind == "cublaslt" else -rows_scope(self.num_rows)
        weight = self.weight_NK.shape, self.weight_NK.dtype
        return "linear", *weight, self.bias_N is None, self.out_dtype, self.silu_mul, rows

    def draw(self, seed: int, plan: LinearPlan) -> torch.Tensor:
        count = self.num_rows if plan.kind == "cublaslt" else min(self.num_rows, MAX_COMPARED_ROWS)
        return draw_rows(seed, count, self.weight_NK.shape[1], self.weight_NK)

    def expected(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [self._reference(inputs, part) for part in self._parts()]

    def found(self, inputs: torch.Tensor, plan: LinearPlan) -> list[torch.Tensor]:
        """RuntimeError if some result was not written, also where none are compared."""
        out = torch.full((len(inputs), self._out_features), math.nan, dtype=self.out_dtype, device=inputs.device)
        self.run(inputs, out, plan)
        parts = self._parts()
        num_unwritten = int(out[:, parts[0].stop : parts[-1].start].isnan().sum())
        if num_unwritten:
            raise RuntimeError(f"{num_unwritten} of {out.numel()} values were not written, or are NaN")
        return [out[:, part] for part in parts]

    @property
    def _out_features(self) -> int:
        return self.weight_NK.shape[0] // (2 if self.silu_mul else 1)

    def _parts(self) -> list[slice]:
        """Disjoint if the result is wider than both."""
        count = self._out_features
        half = _MAX_COMPARED_OUTPUTS // 2
        return [slice(0, count)] if count <= 2 * half else [slice(0, half), slice(count - half, count)]

    def _reference(self, x_TK: torch.Tensor, part: slice) -> torch.Tensor:
        weight_NK = self.weight_NK[part]
        if self.silu_mul:
            weight_NK = torch.cat([half[part] for half in self.weight_NK.chunk(2)])
        bias_N = None if self.bias_N is None else self.bias_N[part]
        out = torch.empty((len(x_TK), part.stop - part.start), dtype=self.out_dtype, device=x_TK.device)
        launch.run_linear(x_TK, weight_NK, bias_N, out, REFERENCE_LINEAR, silu_mul=self.silu_mul)
        return out


@dataclass(frozen=True, slots=True)
class ExpertsTrial:
    """Both GEMMs of experts first_expert : first_expert + E. `run`: x, experts, as they are served."""

    run: Callable[[torch.Tensor, torch.Tensor, MoePlan], torch.Tensor]
    shape: MoeShape
    first_expert: int
    num_rows: int
    like: torch.Tensor  # of the device and the type of the rows

    @property
    def subject(self) -> str:
        shape = self.shape
        return (
            f"experts {shape.num_experts} x ({shape.hidden} x {shape.features}), {shape.top_k} of a row, "
            f"{self.num_rows} rows"
        )

    @property
    def others(self) -> Sequence[MoePlan]:
        return unmeasured_moe_plan(self.shape, self.num_rows), REFERENCE_MOE

    def scope(self, plan: MoePlan) -> Hashable:
        by_pair = self.num_rows * self.shape.top_k < self.shape.num_experts  # decides what is compiled
        return "experts", self.shape, self.like.dtype, rows_scope(self.num_rows), by_pair

    def draw(self, seed: int, plan: MoePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and experts (T, J) int32, ascending; some that are not here if there are fewer here than a row has."""
        count = min(self.num_rows, MAX_COMPARED_ROWS)
        generator = torch.Generator(device=self.like.device).manual_seed(seed)
        num_known = max(self.shape.num_experts, self.shape.top_k)
        scores_TE = torch.rand((count, num_known), generator=generator, device=self.like.device)
        experts_TJ = scores_TE.topk(self.shape.top_k, dim=1).indices.sort(dim=1).values
        return draw_rows(seed, count, self.shape.hidden, self.like), (experts_TJ + self.first_expert).int()

    def expected(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        return self.found(inputs, REFERENCE_MOE)

    def found(self, inputs: tuple[torch.Tensor, torch.Tensor], plan: MoePlan) -> list[torch.Tensor]:
        x_TK, experts_TJ = inputs
        rows_TJK = self.run(x_TK, experts_TJ, plan)
        is_here_TJ = experts_TJ < self.first_expert + self.shape.num_experts
        return [torch.where(is_here_TJ[:, :, None], rows_TJK, 0)]  # others are not written
