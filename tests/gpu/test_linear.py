"""GEMM: every plan, row count, shard and neighbour gives the reference's bits; planted mistakes do not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import torch

from benchmarks.gpu.candidates import candidates, hopper, stream
from benchmarks.gpu.gemm import revealing_inputs, use_default_cublas
from benchmarks.gpu.linear_checks import chain_differs, failures
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.cuda_weights import CudaLinearWeight
from cluster.engine.kernels.triton import launch, launch_hopper, linear, linear_hopper, linear_stream, overlap
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, LinearPlan
from tests.gpu.support import bits_equal, in_graph, mutated, num_differing, relative_error

SHAPES = [(6144, 4096), (4096, 14336), (576, 576), (1536, 576), (960, 576), (200, 1000)]


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


def operands(num_rows: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, CudaLinearWeight]:
    torch.manual_seed(seed)
    weight = torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * k**-0.5
    return revealing_inputs(num_rows, k, seed), CudaLinearWeight(weight)


def run(
    ops: CudaOps, x: torch.Tensor, weight: CudaLinearWeight, plan: LinearPlan, silu: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """The accumulators themselves: a rounded result would hide most differences."""
    n = weight.out_features // 2 if silu else weight.out_features
    out = torch.full((x.shape[0], n), float("nan"), device="cuda", dtype=dtype)
    ops.run_linear(x, weight, None, out, plan, silu_mul=silu)
    return out


def test_reference_is_right_in_float64(ops: CudaOps) -> None:
    x, weight = operands(77, 640, 4096)
    assert relative_error(run(ops, x, weight, REFERENCE_LINEAR), x.double() @ weight.weight_NK.double().t()) < 5e-3


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 3, 17, 64, 100, 200, 1000, 4096])
def test_every_candidate_has_the_reference_bits(ops: CudaOps, num_rows: int, n: int, k: int) -> None:
    x, weight = operands(4096, n, k)
    expected = run(ops, x, weight, REFERENCE_LINEAR)[:num_rows]
    failed = {}
    for plan in candidates(num_rows, silu_mul=False)[:: 1 if n * k < 10**6 else 3]:
        if plan.kind == "cublaslt":
            continue  # admitted per shape, by the tuner
        differing = num_differing(run(ops, x[:num_rows], weight, plan), expected)
        if differing:
            failed[plan] = differing
    assert not failed


@pytest.mark.parametrize("silu", [False, True])
def test_a_row_is_the_same_at_any_position_among_any_neighbours(ops: CudaOps, silu: bool) -> None:
    x, weight = operands(4096, 2048, 1024)
    expected = run(ops, x, weight, REFERENCE_LINEAR, silu, torch.bfloat16)
    for start, count in ((0, 1), (5, 1), (4095, 1), (3, 16), (1000, 63), (77, 129), (2047, 1024)):
        out = (
            ops.linear_silu_mul(x[start : start + count], weight)
            if silu
            else ops.linear(x[start : start + count], weight)
        )
        assert bits_equal(out, expected[start : start + count]), (start, count)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 300])
@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_column_shards_equal_the_whole(ops: CudaOps, num_rows: int, degree: int) -> None:
    x, weight = operands(num_rows, 3072, 2048)
    whole = ops.linear(x, weight, out_dtype=torch.float32)
    shards = [ops.linear(x, ops.pack_linear(part), out_dtype=torch.float32) for part in weight.weight_NK.chunk(degree)]
    assert bits_equal(torch.cat(shards, dim=1), whole)


def test_fp32_result_rounds_to_the_bf16_result(ops: CudaOps) -> None:
    for num_rows in (1, 64, 512):
        x, weight = operands(num_rows, 1024, 4096)
        assert bits_equal(ops.linear(x, weight, out_dtype=torch.float32).bfloat16(), ops.linear(x, weight))


def test_bias_is_added_before_the_one_rounding(ops: CudaOps) -> None:
    bias = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    for num_rows in (1, 40, 512):
        x, weight = operands(num_rows, 1024, 2048)
        fp32 = ops.linear(x, weight, out_dtype=torch.float32)
        assert bits_equal(ops.linear(x, weight, bias), (fp32 + bias.float()).bfloat16())


def test_silu_mul_matches_its_formula_in_float64(ops: CudaOps) -> None:
    for num_rows in (1, 64, 512):
        torch.manual_seed(3)
        x = torch.randn((num_rows, 1024), device="cuda", dtype=torch.bfloat16)
        weight = ops.pack_linear(torch.randn((2048, 1024), device="cuda", dtype=torch.bfloat16) * 0.05)
        gate, up = (x.double() @ weight.weight_NK.double().t()).chunk(2, dim=1)
        expected = gate / (1 + torch.exp(-gate)) * up
        assert relative_error(ops.linear_silu_mul(x, weight), expected) < 5e-3


def test_graph_equals_eager(ops: CudaOps) -> None:
    for num_rows in (1, 64, 256):
        x, weight = operands(num_rows, 2048, 4096)
        assert bits_equal(in_graph(partial(ops.linear, x, weight)), ops.linear(x, weight))


def some(plans: list[LinearPlan]) -> list[LinearPlan]:
    """One plan of each tile shape; what else differs needs no other kernel."""
    return list({(plan.block_m, plan.block_n, plan.swap, plan.persistent): plan for plan in plans}.values())


@pytest.mark.parametrize("pdl", [0, True, overlap.LAUNCH_FIRST])
@pytest.mark.parametrize("num_rows", [3, 16, 64])
def test_streaming_plans_in_every_epilogue_and_in_a_chain(pdl: int, num_rows: int) -> None:
    ops = CudaOps(torch.device("cuda"), pdl=pdl)
    plans = some([*stream(num_rows, silu_mul=True), *stream(num_rows, silu_mul=False)])
    plans.append(msgspec.structs.replace(plans[0], launch_first=False))
    assert {plan: found for plan in plans if (found := failures(ops, plan))} == {}


@pytest.mark.parametrize(
    "plan", some([plan for rows in (96, 160, 250, 4096) for plan in hopper(rows, silu_mul=False)]), ids=str
)
def test_warp_group_plans_in_every_epilogue_and_in_a_chain(ops: CudaOps, plan: LinearPlan) -> None:
    assert failures(ops, plan) == []


def test_plans_for_the_copy_engine_fall_back_where_rows_are_not_aligned(ops: CudaOps) -> None:
    for num_rows, plan in ((5, next(stream(5, silu_mul=False))), (300, next(hopper(300, silu_mul=False)))):
        x, weight = operands(num_rows, 300, 331)
        assert bits_equal(run(ops, x, weight, plan), run(ops, x, weight, REFERENCE_LINEAR))


@pytest.mark.parametrize(
    ("module", "name", "wait", "plan"),
    [
        (linear_stream, "linear_stream", "    if PDL:\n        gdc_wait()\n", next(stream(16, silu_mul=False))),
        (linear_hopper, "linear_hopper", "        gdc_wait()\n", next(hopper(160, silu_mul=False))),
    ],
    ids=["stream", "hopper"],
)
def test_planted_read_before_the_wait_is_found(
    ops: CudaOps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, wait: str,
    plan: LinearPlan,
) -> None:  # fmt: skip
    """Without the wait a kernel takes x from before its predecessor wrote it: the chain must show that."""
    without = wait.replace("gdc_wait()", "pass")
    monkeypatch.setattr(launch_hopper, name, mutated(module, wait, without, tmp_path))
    assert chain_differs(ops, plan, replays=50)


def test_planted_second_chain_is_found(ops: CudaOps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands(64, 1024, 4096)
    expected = run(ops, x, weight, REFERENCE_LINEAR)
    two_chains = "even, acc = acc, tl.dot(x, w, even)"
    broken = mutated(linear, "            acc = tl.dot(x, w, acc)", f"            {two_chains}", tmp_path)
    broken = mutated(
        broken,
        "    for k in range(0, K, BLOCK_K):\n        cols",
        "    even = acc\n    for k in range(0, K, BLOCK_K):\n        cols",
        tmp_path,
    )
    broken = mutated(
        broken,
        "    y = _finish(acc, up, bias_ptr, offs_n,",
        "    y = _finish(acc + even, up, bias_ptr, offs_n,",
        tmp_path,
    )
    monkeypatch.setattr(launch, "linear", broken)
    assert num_differing(run(ops, x, weight, REFERENCE_LINEAR), expected) > 0


def test_planted_split_k_is_found(ops: CudaOps) -> None:
    x, weight = operands(64, 1024, 4096)
    halves = []
    for start in (0, 2048):
        part = CudaLinearWeight(weight.weight_NK[:, start : start + 2048].contiguous())
        out = torch.empty((64, 1024), device="cuda")
        ops.run_linear(x[:, start : start + 2048].contiguous(), part, None, out, REFERENCE_LINEAR, silu_mul=False)
        halves.append(out)
    assert num_differing(halves[0] + halves[1], run(ops, x, weight, REFERENCE_LINEAR)) > 0


def test_default_cublas_with_split_k_would_be_found(ops: CudaOps) -> None:
    """The data reveals what the product must not use: down_proj at one row, split-K allowed."""
    x, weight = operands(8, 4096, 14336)
    expected = run(ops, x, weight, REFERENCE_LINEAR)
    use_default_cublas()
    try:
        out = x @ weight.weight_NK.t()
    finally:
        CudaOps(torch.device("cuda"))
    assert num_differing(out, expected.bfloat16()) > 0
