"""Whether a GEMM plan has the reference's bits: every epilogue, odd sizes, chains of dependent kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu.candidates import fits
from benchmarks.gpu.gemm import revealing_inputs
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.cuda_weights import CudaLinearWeight
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, LinearPlan

_WIDTH = 1024  # of the layers of a chain


class Case(NamedTuple):
    num_rows: int
    n: int  # outputs; SwiGLU has twice as many rows of W
    k: int
    dtype: torch.dtype = torch.float32  # fp32 shows the accumulators themselves
    bias: bool = False
    silu: bool = False


def cases(plan: LinearPlan) -> Iterator[Case]:
    """Rows below, at and above a tile; N and K that no tile divides. A plan may fit for SwiGLU alone, or never."""
    few = plan.kind == "stream"
    rows = plan.block_m if few else 300
    if fits(plan, silu_mul=False):
        for num_rows in (1, 5, rows - 1, rows, rows + 9) if few else (256, 257, 300, 511, 2048):
            yield Case(num_rows, 1536, 2048)
        for n, k in ((200, 1000), (576, 576), (6144, 4096), (1056, 64)):
            yield Case(rows, n, k)
        yield Case(rows, 1536, 2048, torch.bfloat16)
        yield Case(rows, 1536, 2048, torch.bfloat16, bias=True)
        yield Case(rows - 1, 1000, 1024, torch.float32, bias=True)
    if fits(plan, silu_mul=True):
        for num_rows, n in ((rows, 1536), (max(1, rows - 3), 1000), (rows, 14336)):
            yield Case(num_rows, n, 1024, torch.bfloat16, silu=True)


def num_differing(ops: CudaOps, plan: LinearPlan, case: Case) -> int:
    """Elements whose bits differ from the reference plan's, the result poisoned before."""
    torch.manual_seed(case.num_rows)
    x = revealing_inputs(case.num_rows, case.k, seed=case.n)
    rows = case.n * (2 if case.silu else 1)
    weight = CudaLinearWeight(torch.randn((rows, case.k), device="cuda", dtype=torch.bfloat16) * case.k**-0.5)
    bias = torch.randn(case.n, device="cuda", dtype=torch.bfloat16) if case.bias else None
    results = []
    for each in (plan, REFERENCE_LINEAR):
        out = torch.full((case.num_rows, case.n), float("nan"), device="cuda", dtype=case.dtype)
        ops.run_linear(x, weight, bias, out, each, silu_mul=case.silu)
        results.append(out.view(torch.int16 if case.dtype == torch.bfloat16 else torch.int32))
    return int((results[0] != results[1]).sum())


def chain_differs(ops: CudaOps, plan: LinearPlan, replays: int = 5) -> bool:
    """Six layers of norm, two GEMMs in a row, and a residual, in one graph: each kernel reads what the last wrote.

    Replayed with other inputs each time, so that a kernel that overtakes its predecessor shows.
    """
    torch.manual_seed(7)
    rows = plan.block_m if plan.kind == "stream" else 300
    weights = [
        CudaLinearWeight(torch.randn((_WIDTH, _WIDTH), device="cuda", dtype=torch.bfloat16) * _WIDTH**-0.5)
        for _ in range(12)
    ]
    ones = torch.ones(_WIDTH, device="cuda", dtype=torch.bfloat16)
    x = torch.empty((rows, _WIDTH), device="cuda", dtype=torch.bfloat16)

    def linear(value: torch.Tensor, index: int, each: LinearPlan) -> torch.Tensor:
        out = torch.empty((rows, _WIDTH), device="cuda", dtype=torch.bfloat16)
        ops.run_linear(value, weights[index], None, out, each, silu_mul=False)
        return out

    def run(each: LinearPlan) -> torch.Tensor:
        residual = x.clone()
        normed = ops.rms_norm(residual, ones, 1e-5)
        for index in range(0, len(weights), 2):
            update = linear(linear(normed, index, each), index + 1, each)
            normed = ops.add_rms_norm(residual, update, ones, 1e-5)
        return normed

    x.normal_()
    run(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(plan)
    for _ in range(replays):
        x.normal_()
        expected = run(REFERENCE_LINEAR)
        graph.replay()
        if not torch.equal(out.view(torch.int16), expected.view(torch.int16)):
            return True
    return False


def outcomes(ops: CudaOps, plan: LinearPlan) -> Iterator[str]:
    """What differs, in words, case by case; empty where nothing does."""
    for case in cases(plan):
        differing = num_differing(ops, plan, case)
        yield f"{differing} differ: {case}" if differing else ""
    if fits(plan, silu_mul=False):
        yield "a chain of dependent kernels differs" if chain_differs(ops, plan) else ""


def failures(ops: CudaOps, plan: LinearPlan) -> list[str]:
    return [outcome for outcome in outcomes(ops, plan) if outcome]
