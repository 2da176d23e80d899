"""Inputs of the experts' kernels, and their results through the plain GEMM, expert by expert."""

from __future__ import annotations

import torch

from benchmarks.gpu.gemm import revealing_inputs
from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.moe_plans import MoeShape
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR


class MoeInputs:
    """One layer's weights on the device, rows whose sums reveal an order, and a random choice of experts."""

    def __init__(self, shape: MoeShape, num_rows: int, seed: int = 0) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        hidden, features, experts = shape.hidden, shape.features, shape.num_experts

        def normal(*size: int) -> torch.Tensor:
            return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)

        self.shape = shape
        self.x = revealing_inputs(num_rows, hidden, seed)
        self.gate_up = normal(experts, 2 * features, hidden).mul_(hidden**-0.5)
        self.down = normal(experts, hidden, features).mul_(features**-0.5)
        self.experts = self.choice(num_rows, generator)

    def choice(self, num_rows: int, generator: torch.Generator) -> torch.Tensor:
        """(T, J) int32 different experts, ascending."""
        scores = torch.rand((num_rows, self.shape.num_experts), generator=generator, device="cuda")
        return scores.topk(self.shape.top_k, dim=1).indices.sort(dim=1).values.int()

    def through_linear(
        self, x: torch.Tensor, experts: torch.Tensor, out_dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """(T, J, K): the rows of each expert through the reference plan of the plain GEMM."""
        rows = torch.full((*experts.shape, self.shape.hidden), float("nan"), device="cuda", dtype=out_dtype)
        for expert in experts.unique().tolist():
            row, place = (experts == expert).nonzero(as_tuple=True)
            active = torch.empty((len(row), self.shape.features), device="cuda", dtype=torch.bfloat16)
            launch.run_linear(x[row], self.gate_up[expert], None, active, REFERENCE_LINEAR, silu_mul=True)
            out = torch.empty((len(row), self.shape.hidden), device="cuda", dtype=out_dtype)
            launch.run_linear(active, self.down[expert], None, out, REFERENCE_LINEAR)
            rows[row, place] = out
        return rows
