"""Operands of the FP8 sweep: the layers of an 8B model, random as weights are, and hard ones that reveal orders."""

from __future__ import annotations

import torch

from benchmarks.gpu.shapes import Layer
from cluster.engine.kernels import fp8 as numbers
from cluster.engine.kernels.cuda_fp8 import CudaFp8, CudaFp8Weight
from cluster.engine.kernels.fp8 import Scaling, quantize_weight
from cluster.engine.kernels.probes_fp8 import order_revealing_e4m3
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = (
    Layer("8b.qkv", 6144, 4096),
    Layer("8b.o", 4096, 4096),
    Layer("8b.down", 4096, 14336),
    Layer("8b.gate_up", 28672, 4096),
    Layer("8b.gate_up_silu", 28672, 4096, silu_mul=True),
)


def random_e4m3(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """uint8: all finite e4m3 numbers equally often, so sums cancel over 16 powers of two."""
    values = torch.randint(0, 256, (rows, columns), generator=generator, device="cuda", dtype=torch.uint8)
    return torch.where(values & 0x7F == 0x7F, 0, values)


class HardOperands:
    """Rows and a weight of random e4m3 numbers with random scales, and products of their first rows."""

    def __init__(
        self, fp8: CudaFp8, outputs: int, inputs: int, num_rows: int, seed: int, *, reveals_order: bool = False
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        self._fp8 = fp8
        if reveals_order:
            x, w = order_revealing_e4m3(num_rows, outputs, inputs, generator)
        else:
            x, w = random_e4m3(num_rows, inputs, generator), random_e4m3(outputs, inputs, generator)
        self.rows = torch.zeros(
            (num_rows, numbers.row_bytes(inputs, Scaling.CHANNEL)), dtype=torch.uint8, device="cuda"
        )  # fmt: skip
        values, scales = numbers.split_rows(self.rows, inputs, Scaling.CHANNEL)
        values[:, :inputs].view(torch.uint8).copy_(x)
        scales.copy_(torch.rand(scales.shape, generator=generator, device="cuda") + 0.5)
        scale = (torch.rand(outputs, generator=generator, device="cuda") + 0.5) * 1e-5  # so that SwiGLU stays finite
        self.weight = fp8.pack(w.view(torch.float8_e4m3fn), scale)

    def run(
        self, plan: Fp8Plan, num_rows: int, dtype: torch.dtype, *, silu_mul: bool = False, promote: bool = True,
        chain: int = numbers.CHANNEL_CHAIN,
    ) -> torch.Tensor:  # fmt: skip
        """The product of the first rows, written into poisoned memory."""
        features = self.weight.out_features // (2 if silu_mul else 1)
        out = torch.full((num_rows, features), float("nan"), device="cuda", dtype=dtype)
        self._fp8.run_linear(
            self.rows[:num_rows], self.weight, None, out, plan, silu_mul=silu_mul, promote=promote, chain=chain
        )  # fmt: skip
        return out

    def accumulators(self, plan: Fp8Plan, num_rows: int, *, promote: bool = True) -> torch.Tensor:
        """fp32 sums, without scales."""
        rows = self.rows[:num_rows].clone()
        numbers.split_rows(rows, self.weight.in_features, Scaling.CHANNEL)[1].fill_(1.0)
        weight = CudaFp8Weight(self.weight.values_NP, torch.ones_like(self.weight.scale), self.weight.in_features)
        out = torch.full((num_rows, weight.out_features), float("nan"), device="cuda")
        self._fp8.run_linear(rows, weight, None, out, plan, silu_mul=False, promote=promote)
        return out


def random_weights(fp8: CudaFp8, layer: Layer, cold_bytes: int) -> list[CudaFp8Weight]:
    """Enough copies that L2 stays cold."""
    n, k = layer.out_features, layer.in_features
    weight_NK = torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * k**-0.5
    values, scale = quantize_weight(weight_NK)
    copies = max(1, min(12, -(-cold_bytes // (n * k))))
    return [fp8.pack(values, scale) for _ in range(copies)]
