"""What must be measured to settle the canonical order of FP8: asked on one shape, answered in a few lines.

- Does a chain left in the tensor core differ, and how wrong is it?
- Is adding every 128 features slower than not adding?
- Which order does torch._scaled_mm keep, for what it is worth as a candidate?
- What do the quantising kernels cost, alone and fused?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.fp8_layers import HardOperands
from benchmarks.gpu.fp8_vet import CANNOT_RUN
from benchmarks.gpu.timing import graph_ms
from cluster.engine.kernels import fp8 as numbers
from cluster.engine.kernels.cuda_fp8 import library_linear
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import Scaling
from cluster.engine.kernels.triton import fp8_launch, launch
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan

_WIDE = Fp8Plan(kind="tma", block_m=128, block_n=128, num_warps=8, num_stages=4)
_FEW = Fp8Plan(block_m=16, block_n=64, num_stages=6, swap=True, evict_first=True)


def ask(ops: CudaOps) -> None:
    """Print the answers."""
    hard = HardOperands(ops.fp8, 4096, 4096, 4096, seed=3)
    _about_chains(hard)
    _about_the_library(hard)
    _about_quantising(ops)


def _product(hard: HardOperands, num_rows: int) -> torch.Tensor:
    """float64."""
    values, scales = numbers.split_rows(hard.rows[:num_rows], 4096, Scaling.CHANNEL)
    exact = values.double() @ hard.weight.values_NP.double().t()
    return exact * scales.double() * hard.weight.scale.double()


def _about_chains(hard: HardOperands) -> None:
    exact = _product(hard, 512)
    for name, promote in (("groups of 128 added in fp32", True), ("one chain in the tensor core", False)):
        plans = (REFERENCE_FP8, _FEW, _WIDE)
        found = [hard.run(plan, 512, torch.float32, promote=promote) for plan in plans]
        error = float((found[0] - exact).norm() / exact.norm())
        bias = float((found[0] * exact).sum() / (exact * exact).sum() - 1)
        differing = [int((other != found[0]).sum()) for other in found[1:]]
        few_ms = _ms(partial(hard.run, _FEW, 16, torch.bfloat16, promote=promote))
        wide_ms = _ms(partial(hard.run, _WIDE, 4096, torch.bfloat16, promote=promote))
        print(
            f"{name}: error {error:.2e}, bias {bias:+.2e}, differing between plans {differing}, "
            f"4096 x 4096: {few_ms * 1e3:.1f} us at 16 rows, {wide_ms * 1e3:.1f} us at 4096"
        )


def _about_the_library(hard: HardOperands) -> None:
    """Its results against orders of the sum and of the scales: ours is the first one."""
    w_scale = hard.weight.scale
    for num_rows in (64, 2048):
        values, x_scale = numbers.split_rows(hard.rows[:num_rows], 4096, Scaling.CHANNEL)
        orders: dict[str, torch.Tensor] = {}
        for name, promote in (("groups", True), ("chain", False)):
            sums = hard.accumulators(REFERENCE_FP8, num_rows, promote=promote)
            orders[f"({name}*x)*w"] = (sums * x_scale) * w_scale
            orders[f"({name}*w)*x"] = (sums * w_scale) * x_scale
            orders[f"{name}*(x*w)"] = sums * (x_scale * w_scale)
        for fast in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                out = torch.empty((num_rows, 4096), device="cuda", dtype=dtype)
                try:
                    library_linear(values, x_scale, hard.weight, out, use_fast_accum=fast)
                except RuntimeError as error:
                    found = str(error).splitlines()[0][:120]
                else:
                    counts = {name: int((out != y.to(dtype)).sum()) for name, y in orders.items()}
                    found = "values that differ: " + ", ".join(f"{name} {count}" for name, count in counts.items())
                print(f"_scaled_mm, {num_rows} rows, use_fast_accum={fast}, {dtype}: {found}")


def _about_quantising(ops: CudaOps) -> None:
    norm = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    channel = Scaling.CHANNEL
    for rows in (1, 32, 256, 8192):
        x, update = (torch.randn((rows, 4096), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        wide = torch.randn((rows, 28672), device="cuda", dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "norm": partial(launch.run_rms_norm, x, update, norm, 1e-5, torch.bfloat16),
            "norm, quantise": partial(fp8_launch.rms_norm_quantize, x, update, norm, 1e-5, channel),
            "quantise 4096": partial(fp8_launch.quantize, x, channel),
            "quantise 28672": partial(fp8_launch.quantize, wide, channel),
            "silu*up 14336, quantise": partial(fp8_launch.silu_mul_quantize, wide, channel),
        }
        print(f"us at {rows} rows: " + "; ".join(f"{name} {_ms(call) * 1e3:.1f}" for name, call in calls.items()))


def _ms(call: Callable[[], object]) -> float:
    try:
        return graph_ms([call], min_ms=1.0, replays=3)
    except CANNOT_RUN:
        return math.nan
