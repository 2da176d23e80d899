"""torch's own bf16 linear (oneDNN) as a candidate.

It is fast and offered for comparison. With AMX it is refused: it blocks K differently for different
numbers of rows, so a row's bits depend on its neighbours. `cluster doctor` shows the refusal.
"""

from __future__ import annotations

import torch

from cluster.engine.kernels.cpu.arithmetic import silu_mul
from cluster.engine.kernels.cpu.reference import ReferenceOps, ReferenceWeight
from cluster.engine.kernels.ops import LinearWeight


class OneDnnOps(ReferenceOps):
    """The linear family by torch; everything else as in the reference."""

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        assert isinstance(weight, ReferenceWeight)
        y_TN = torch.nn.functional.linear(x_TK, weight.weight_NK)
        if bias_N is not None:
            y_TN = y_TN.float() + bias_N.float()
        return y_TN.to(out_dtype)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        gate, up = self.linear(x_TK, gate_up, out_dtype=torch.float32).chunk(2, dim=1)
        return silu_mul(gate, up).bfloat16()
