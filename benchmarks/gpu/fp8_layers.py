"""Operands of the FP8 sweep: the layers of an 8B model, random as weights are, and hard ones that reveal orders."""

from __future__ import annotations

import torch

from benchmarks.gpu.shapes import Layer
from cluster.engine.kernels import fp8 as numbers
from cluster.engine.kernels.cuda_fp8 import CudaFp8, CudaFp8Weight
from cluster.engine.kernels.fp8 import Scaling, quantize_weight
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


def order_revealing_e4m3(
    num_rows: int, outputs: int, inputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 x (M, K) and w (N, K) by whose products the order of the groups is seen.

    Sums of random groups have some 14 bits each and are about as large as each other: fp32 adds them exactly, in
    any order. Here large groups, about 2^20, alternate with small ones, about 2^-4, and are cancelled two groups
    later by the same numbers with the other sign: what fp32 drops of the small ones depends on when they come.
    """
    device = generator.device

    def draw(count: int, columns: int, smallest: int, largest: int) -> torch.Tensor:
        """Random signs and mantissas, exponent fields within bounds; the largest of all is NaN's neighbour."""
        exponents = torch.randint(smallest, largest + 1, (count, columns), generator=generator, device=device)
        mantissas = torch.randint(0, 7, (count, columns), generator=generator, device=device)
        signs = torch.randint(0, 2, (count, columns), generator=generator, device=device)
        return (signs * 0x80 + exponents * 8 + mantissas).to(torch.uint8)

    x, w = draw(num_rows, inputs, 1, 4), draw(outputs, inputs, 1, 4)
    group = numbers.GROUP
    for start in range(group, inputs - 3 * group + 1, 4 * group):
        loud, opposite = slice(start, start + group), slice(start + 2 * group, start + 3 * group)
        x[:, loud], w[:, loud] = draw(num_rows, group, 15, 15), draw(outputs, group, 15, 15)
        x[:, opposite], w[:, opposite] = x[:, loud], w[:, loud] ^ 0x80
    return x, w


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
        self, plan: Fp8Plan, num_rows: int, dtype: torch.dtype, *, silu_mul: bool = False, promote: bool = True
    ) -> torch.Tensor:
        """The product of the first rows, written into poisoned memory."""
        features = self.weight.out_features // (2 if silu_mul else 1)
        out = torch.full((num_rows, features), float("nan"), device="cuda", dtype=dtype)
        self._fp8.run_linear(
            self.rows[:num_rows], self.weight, None, out, plan, silu_mul=silu_mul, promote=promote
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
