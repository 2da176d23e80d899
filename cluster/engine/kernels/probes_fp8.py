"""Seeded runs of FP8 layers, as `probes.py` has them for everything else."""

from __future__ import annotations

import torch

from cluster.engine.kernels.fp8 import GROUP, quantize_weight, quantize_weight_blocks
from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.kernels.probes import Magnitudes, Outputs, Probe, draw


def pack_drawn(
    ops: Ops, generator: torch.Generator, outputs: int, inputs: int, magnitudes: Magnitudes, block_rows: int
) -> LinearWeight:
    """A seeded FP8 weight; `block_rows` rows share a block scale, 0: each row has its own."""
    weight_NK = draw(generator, outputs, inputs, magnitudes) * inputs**-0.5
    values, scale = quantize_weight_blocks(weight_NK, block_rows) if block_rows else quantize_weight(weight_NK)
    return ops.pack_fp8(values.to(ops.device), scale.to(ops.device))


def fp8_linear_probe(rows: int, outputs: int, inputs: int, magnitudes: Magnitudes, block_rows: int = 0) -> Probe:
    """Both dtypes of `linear`, one with a bias, one row of zeros and one with a NaN among the others."""

    def run(ops: Ops) -> Outputs:
        generator = torch.Generator().manual_seed(rows + outputs + inputs)
        x = draw(generator, rows + 2, inputs, magnitudes).bfloat16()
        x[rows] = 0.0
        x[rows + 1, inputs // 2] = torch.nan
        weight = pack_drawn(ops, generator, outputs, inputs, magnitudes, block_rows)
        bias = torch.randn(outputs, generator=generator).bfloat16().to(ops.device)
        x = x.to(ops.device)
        return ops.linear(x, weight, out_dtype=torch.float32), ops.linear(x, weight, bias)

    return Probe(f"fp8 linear {rows}x{outputs}x{inputs} {magnitudes.value} blocks of {block_rows}", run)


def order_revealing_e4m3(
    num_rows: int, outputs: int, inputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 x (M, K) and w (N, K) by whose products the order of the groups is seen.

    On a GPU the sums of random groups have some 14 bits each and are about as large as each other: fp32 adds
    them exactly, in any order. Here large groups, about 2^20, alternate with small ones, about 2^-4, and are
    cancelled two groups later by the same numbers with the other sign: what fp32 drops of the small ones depends
    on when they come.
    """
    device = generator.device

    def draw(count: int, columns: int, smallest: int, largest: int) -> torch.Tensor:
        """Random signs and mantissas, exponent fields within bounds; the largest of all is NaN's neighbour."""
        exponents = torch.randint(smallest, largest + 1, (count, columns), generator=generator, device=device)
        mantissas = torch.randint(0, 7, (count, columns), generator=generator, device=device)
        signs = torch.randint(0, 2, (count, columns), generator=generator, device=device)
        return (signs * 0x80 + exponents * 8 + mantissas).to(torch.uint8)

    x, w = draw(num_rows, inputs, 1, 4), draw(outputs, inputs, 1, 4)
    group = GROUP
    for start in range(group, inputs - 3 * group + 1, 4 * group):
        loud, opposite = slice(start, start + group), slice(start + 2 * group, start + 3 * group)
        x[:, loud], w[:, loud] = draw(num_rows, group, 15, 15), draw(outputs, group, 15, 15)
        x[:, opposite], w[:, opposite] = x[:, loud], w[:, loud] ^ 0x80
    return x, w


def fp8_groups_probe(rows: int, outputs: int, inputs: int) -> Probe:
    """A product that shows in which order the sums of the groups are added."""

    def run(ops: Ops) -> Outputs:
        generator = torch.Generator().manual_seed(rows + outputs + inputs)
        x, w = (each.view(torch.float8_e4m3fn) for each in order_revealing_e4m3(rows, outputs, inputs, generator))
        weight = ops.pack_fp8(w.to(ops.device), torch.ones(outputs, device=ops.device))
        return (ops.linear(x.bfloat16().to(ops.device), weight, out_dtype=torch.float32),)

    return Probe(f"fp8 groups {rows}x{outputs}x{inputs}", run)


def fp8_layers_probe(rows: int, width: int, features: int, block_rows: int = 0) -> Probe:
    """norm -> SwiGLU -> down, quantised on the way where they are made; and the same, each by itself."""

    def run(ops: Ops) -> Outputs:
        generator = torch.Generator().manual_seed(rows + width)
        residual = draw(generator, rows, width, Magnitudes.NORMAL).to(ops.residual_dtype).to(ops.device)
        norm = torch.rand(width, generator=generator).bfloat16().to(ops.device)
        gate_up = pack_drawn(ops, generator, 2 * features, width, Magnitudes.NORMAL, block_rows)
        down = pack_drawn(ops, generator, width, features, Magnitudes.NORMAL, block_rows)
        normed = ops.rms_norm(residual, norm, 1e-5, input_of=gate_up)
        update = ops.linear(ops.linear_silu_mul(normed, gate_up, input_of=down), down)
        alone = ops.linear(ops.linear_silu_mul(ops.rms_norm(residual, norm, 1e-5), gate_up), down)
        added = ops.add_rms_norm(residual, update, norm, 1e-5, input_of=gate_up)
        return update, alone, ops.linear(added, gate_up), residual

    return Probe(f"fp8 layers {rows}x{width}x{features} blocks of {block_rows}", run)
