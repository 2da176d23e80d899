"""FP8 layers on a CPU: no processor here multiplies e4m3, so their products are summed in float64.

Slow, and right by construction: a group of 128 products of e4m3 numbers is a multiple of 2^-18 below 2^25 (four of
them: 2^27), so that float64 holds every partial sum exactly and the order within a chain does not matter. The rest is
fp32, one rounding at a time, in the order of docs/numerics.md. Here so that an FP8 model runs where there is
no GPU, in tests above all; its bits are the CPU's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels import fp8
from cluster.engine.kernels.composed import DelegatingOps
from cluster.engine.kernels.cpu.arithmetic import fma, silu_mul
from cluster.engine.kernels.fp8 import GROUP, Scaling
from cluster.engine.kernels.ops import LinearWeight


@dataclass(frozen=True, slots=True)
class CpuFp8Weight:
    """Values by group, ready to be multiplied: as fp32, four times the size they need."""

    values_GNE: torch.Tensor  # E = 128 features of a group
    scale: torch.Tensor  # (N,), or (N, G) spread to all rows
    in_features: int

    @property
    def out_features(self) -> int:
        return self.values_GNE.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values_GNE.nbytes + self.scale.nbytes

    @property
    def scaling(self) -> Scaling:
        return Scaling.CHANNEL if self.scale.ndim == 1 else Scaling.BLOCK

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an embedding is never FP8")


class CpuFp8Ops(DelegatingOps):
    """Adds FP8 layers to the operations of a CPU."""

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> LinearWeight:
        out_features, in_features = values_NK.shape
        padding = fp8.padded_features(in_features) - in_features
        values_NP = torch.nn.functional.pad(values_NK.float(), (0, padding))
        values_GNE = values_NP.view(out_features, -1, GROUP).transpose(0, 1).contiguous()
        if scale.ndim == 2:
            scale = scale.repeat_interleave(out_features // scale.shape[0], 0)
        return CpuFp8Weight(values_GNE, scale, in_features)

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        if not isinstance(weight, CpuFp8Weight):
            return super().linear(x_TK, weight, bias_N, out_dtype=out_dtype)
        y_TN = _product(_quantized(x_TK, weight), weight)
        if bias_N is not None:
            y_TN = y_TN + bias_N.float()
        return y_TN.to(out_dtype)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        if isinstance(gate_up, CpuFp8Weight):
            gate, up = self.linear(x_TK, gate_up).float().chunk(2, dim=1)
            return _quantized(silu_mul(gate, up).bfloat16(), input_of)
        return _quantized(super().linear_silu_mul(x_TK, gate_up), input_of)

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        return _quantized(super().rms_norm(x_TK, weight_K, eps, out_dtype=out_dtype), input_of)

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        return _quantized(super().add_rms_norm(residual_TK, update_TK, weight_K, eps), input_of)


def _quantized(x_TK: torch.Tensor, weight: LinearWeight | None) -> torch.Tensor:
    """As `weight` reads it: rows of bytes if it is FP8."""
    if not isinstance(weight, CpuFp8Weight) or fp8.is_quantized(x_TK):
        return x_TK
    return fp8.quantize_rows(x_TK, weight.scaling)


def _product(rows_TB: torch.Tensor, weight: CpuFp8Weight) -> torch.Tensor:
    """(T, N) fp32, scaled: group sums exact and rounded once, then added in ascending order."""
    values_TP, x_scales_TS = fp8.split_rows(rows_TB, weight.in_features, weight.scaling)
    x_TP = values_TP.float().double()
    acc = torch.zeros((len(x_TP), weight.out_features))
    chain = torch.zeros_like(acc, dtype=torch.float64)
    for group, values_NE in enumerate(weight.values_GNE):
        part = x_TP[:, group * GROUP : (group + 1) * GROUP] @ values_NE.double().t()
        if weight.scaling is Scaling.BLOCK:
            acc = fma(part.float(), x_scales_TS[:, group, None] * weight.scale[None, :, group], acc)
            continue
        chain += part
        if (group + 1) % fp8.CHANNEL_CHAIN == 0 or group + 1 == len(weight.values_GNE):
            acc = acc + chain.float()
            chain.zero_()
    return acc if weight.scaling is Scaling.BLOCK else (acc * x_scales_TS) * weight.scale
