"""Trials (`plan_admission.py`) of FP8 products, as `trials.py` has them for bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from cluster.engine.kernels.fp8 import GROUP, Scaling
from cluster.engine.kernels.plan_admission import MAX_COMPARED_ROWS, rows_scope
from cluster.engine.kernels.triton import fp8_launch
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan, unmeasured_plan

_EXPONENTS = 15  # that groups are apart: sums of groups that are alike are added exactly, in any order


@dataclass(frozen=True, slots=True)
class Fp8Trial:
    """A product with its scales, or SwiGLU with W = [gate; up]. `run`: quantised rows and a result to be filled, as
    they are served."""

    run: Callable[[torch.Tensor, torch.Tensor, Fp8Plan], None]
    weight_shape: tuple[int, int]  # (N, K) as the model has it
    scaling: Scaling
    scale_rows: int
    has_bias: bool
    num_rows: int
    out_dtype: torch.dtype
    silu_mul: bool
    device: torch.device

    @property
    def subject(self) -> str:
        kind = ", SwiGLU" if self.silu_mul else ", with a bias" if self.has_bias else ""
        scales = f", scales by {self.scaling.value}"
        return f"FP8 linear {self._out_features} x {self.weight_shape[1]}, {self.num_rows} rows{scales}{kind}"

    @property
    def others(self) -> Sequence[Fp8Plan]:
        return unmeasured_plan(self.num_rows), REFERENCE_FP8

    def scope(self, plan: Fp8Plan) -> Hashable:
        rows = self.num_rows if plan.kind == "library" else -rows_scope(self.num_rows)
        return "fp8", self.weight_shape, self.scale_rows, self.has_bias, self.out_dtype, self.silu_mul, rows

    def draw(self, seed: int, plan: Fp8Plan) -> torch.Tensor:
        """Quantised rows whose groups are of very different sizes."""
        count = self.num_rows if plan.kind == "library" else min(self.num_rows, MAX_COMPARED_ROWS)
        in_features = self.weight_shape[1]
        generator = torch.Generator(device=self.device).manual_seed(seed)
        x_TK = torch.randn((count, in_features), generator=generator, device=self.device)
        size = (count, -(-in_features // GROUP))
        exponents_TG = torch.randint(-_EXPONENTS, 1, size, generator=generator, device=self.device)
        exponents_TK = exponents_TG.repeat_interleave(GROUP, dim=1)[:, :in_features]
        return fp8_launch.quantize(torch.ldexp(x_TK, exponents_TK).bfloat16(), self.scaling)

    def expected(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return self.found(inputs, REFERENCE_FP8)

    def found(self, inputs: torch.Tensor, plan: Fp8Plan) -> list[torch.Tensor]:
        shape = len(inputs), self._out_features
        out = torch.full(shape, math.nan, dtype=self.out_dtype, device=self.device)  # what is not written differs
        self.run(inputs, out, plan)
        return [out]

    @property
    def _out_features(self) -> int:
        return self.weight_shape[0] // (2 if self.silu_mul else 1)
