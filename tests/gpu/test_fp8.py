"""FP8: kernels quantise as the formula says, every plan has the reference's bits, rows stay alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.fp8_candidates import candidates
from benchmarks.gpu.fp8_layers import HardOperands, random_e4m3
from cluster.engine.kernels import fp8
from cluster.engine.kernels.cuda_fp8 import CudaFp8Weight
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import Scaling, quantize_rows, quantize_weight, quantize_weight_blocks, split_rows
from cluster.engine.kernels.probe_lists import FP8_PROBES
from cluster.engine.kernels.probes import Magnitudes, draw
from cluster.engine.kernels.triton import fp8_launch, fp8_linear, launch
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8PlanIndex, Fp8Table
from tests.gpu.support import bits_equal, in_graph, mutated, num_differing, relative_error
from tests.gpu.support_admission import differing_probes

if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("FP8 is for Hopper: elsewhere e4m3 sums have other bits", allow_module_level=True)

STREAM = Fp8Plan(kind="stream", block_m=16, num_stages=2)
COPY_ENGINE = Fp8Plan(kind="tma", block_m=64, block_n=128, num_warps=4, num_stages=4)
SWAPPED = Fp8Plan(block_m=32, block_n=64, num_stages=6, swap=True, evict_first=True)
RINGS = Fp8Plan(kind="rings", block_m=128, block_n=128, num_stages=6, x_stages=5, lead=2, group_m=4)
WIDE_RINGS = Fp8Plan(kind="rings", block_m=128, block_n=256, num_stages=9, x_stages=4, lead=4, store_parts=2)
PLANS = [STREAM, RINGS, WIDE_RINGS, COPY_ENGINE, SWAPPED]


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


@pytest.fixture(scope="module")
def hard(ops: CudaOps) -> HardOperands:
    """N = 1008 and K = 1664: edges in every tile, and 13 groups, which no ring of stages divides."""
    return HardOperands(ops.fp8, 1008, 1664, 4096, seed=1)


@pytest.fixture(scope="module")
def revealing(ops: CudaOps) -> HardOperands:
    """Of the same shape; the order of its groups shows."""
    return HardOperands(ops.fp8, 1008, 1664, 4096, seed=5, reveals_order=True)


def same_rows(found: torch.Tensor, expected: torch.Tensor, in_features: int, scaling: Scaling) -> bool:
    """Values and scales bit for bit, on whichever devices; any NaN is as good as another."""
    (values, scales), (other_values, other_scales) = (
        split_rows(rows.cpu(), in_features, scaling) for rows in (found, expected)
    )
    return torch.equal(values.view(torch.uint8), other_values.view(torch.uint8)) and bits_equal(
        scales.nan_to_num(-1.0), other_scales.nan_to_num(-1.0)
    )


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("magnitudes", Magnitudes)
@pytest.mark.parametrize("width", [32, 128, 576, 1000, 4096, 14336])
def test_quantise_is_the_formula(scaling: Scaling, magnitudes: Magnitudes, width: int) -> None:
    x = draw(torch.Generator().manual_seed(width), 40, width, magnitudes).bfloat16()
    x[3], x[5, 0], x[6, width - 1], x[7, width // 2] = 0.0, torch.nan, torch.inf, -torch.inf
    expected = quantize_rows(x, scaling)
    assert same_rows(fp8_launch.quantize(x.cuda(), scaling), expected, width, scaling)
    assert same_rows(quantize_rows(x.cuda(), scaling), expected, width, scaling)


def test_quantise_rounds_to_nearest_even_and_saturates() -> None:
    """Every bf16 number up to 448 beside a 448, so that the scale is 1."""
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.float() <= 448.0]
    x = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0, dtype=torch.bfloat16)], dim=1)
    for sign in (1, -1):
        expected = quantize_rows(x * sign, Scaling.CHANNEL)
        assert same_rows(fp8_launch.quantize((x * sign).cuda(), Scaling.CHANNEL), expected, 128, Scaling.CHANNEL)


def test_weights_are_quantised_as_on_a_cpu() -> None:
    weight_NK = draw(torch.Generator().manual_seed(2), 300, 1000, Magnitudes.WIDE).bfloat16()
    for found, expected in zip(quantize_weight(weight_NK.cuda()), quantize_weight(weight_NK), strict=True):
        assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("width", [64, 100, 576, 1536, 4096, 5120, 8192])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_fused_norm_equals_norm_then_quantise(scaling: Scaling, width: int, residual_dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    residual = torch.randn((33, width), device="cuda").to(residual_dtype)
    update = torch.randn((33, width), device="cuda").to(residual_dtype)
    residual[4, 1] = torch.nan
    for norm in (torch.rand(width, device="cuda"), torch.rand(width, device="cuda").bfloat16()):
        plain = launch.run_rms_norm(residual, None, norm, 1e-5, torch.bfloat16)
        fused = fp8_launch.rms_norm_quantize(residual, None, norm, 1e-5, scaling)
        assert same_rows(fused, quantize_rows(plain, scaling), width, scaling)
        ours, theirs = residual.clone(), residual.clone()
        plain = launch.run_rms_norm(theirs, update, norm, 1e-5, torch.bfloat16)
        fused = fp8_launch.rms_norm_quantize(ours, update, norm, 1e-5, scaling)
        assert same_rows(fused, quantize_rows(plain, scaling), width, scaling)
        assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))


def test_reference_is_right_in_float64(hard: HardOperands) -> None:
    values, scales = split_rows(hard.rows[:300], 1664, Scaling.CHANNEL)
    exact = (values.double() @ hard.weight.values_NP.double().t()) * scales.double() * hard.weight.scale.double()
    assert relative_error(hard.run(REFERENCE_FP8, 300, torch.float32), exact) < 4e-3


def test_one_chain_in_the_tensor_core_differs(hard: HardOperands) -> None:
    """The data reveals what is not the canonical order."""
    expected = hard.run(REFERENCE_FP8, 300, torch.float32)
    assert num_differing(hard.run(REFERENCE_FP8, 300, torch.float32, promote=False), expected) > 10_000


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 17, 64, 100, 200, 1000, 4096])
def test_every_candidate_has_the_reference_bits(
    hard: HardOperands, revealing: HardOperands, num_rows: int, silu_mul: bool
) -> None:
    dtype = torch.bfloat16 if silu_mul else torch.float32
    failed = {}
    for name, layer in (("hard", hard), ("revealing", revealing)):
        expected = layer.run(REFERENCE_FP8, num_rows, dtype, silu_mul=silu_mul)
        for plan in candidates(num_rows, silu_mul=silu_mul):
            differing = num_differing(layer.run(plan, num_rows, dtype, silu_mul=silu_mul), expected)
            if differing:
                failed[name, plan] = differing
    assert not failed


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (576, 576), (40, 33)])
def test_shapes_of_models(ops: CudaOps, plan: Fp8Plan, outputs: int, inputs: int) -> None:
    layer = HardOperands(ops.fp8, outputs, inputs, 300, seed=2)
    for num_rows in (1, 5, 70, 300):
        for dtype in (torch.float32, torch.bfloat16):
            expected = layer.run(REFERENCE_FP8, num_rows, dtype)
            assert bits_equal(layer.run(plan, num_rows, dtype), expected), (num_rows, dtype)


def block_operands(
    ops: CudaOps, outputs: int, inputs: int, rows: int, scale_rows: int
) -> tuple[torch.Tensor, CudaFp8Weight]:
    generator = torch.Generator(device="cuda").manual_seed(3)
    x = torch.zeros((rows, fp8.row_bytes(inputs, Scaling.BLOCK)), dtype=torch.uint8, device="cuda")
    values, scales = split_rows(x, inputs, Scaling.BLOCK)
    values[:, :inputs].view(torch.uint8).copy_(random_e4m3(rows, inputs, generator))
    scales.copy_(torch.rand(scales.shape, generator=generator, device="cuda") + 0.5)
    shape = (outputs // scale_rows, fp8.padded_features(inputs) // 128)
    scale = (torch.rand(shape, generator=generator, device="cuda") + 0.5) * 1e-5
    return x, ops.fp8.pack(random_e4m3(outputs, inputs, generator).view(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("silu_mul", [False, True])
@pytest.mark.parametrize("scale_rows", [128, 64, 16])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kind}{plan.block_n}")
def test_block_scales(ops: CudaOps, plan: Fp8Plan, scale_rows: int, silu_mul: bool) -> None:
    rows, weight = block_operands(ops, 768, 1500, 300, scale_rows)
    features = 384 if silu_mul else 768

    def run(used: Fp8Plan, num_rows: int) -> torch.Tensor:
        out = torch.full((num_rows, features), float("nan"), device="cuda")
        ops.fp8.run_linear(rows[:num_rows], weight, None, out, used, silu_mul=silu_mul)
        return out

    if not silu_mul:
        values, scales = split_rows(rows, 1500, Scaling.BLOCK)
        x = values.double() * scales.double().repeat_interleave(128, 1)
        w = fp8.dequantize_weight(weight.values_NP, weight.scale).double()
        assert relative_error(run(REFERENCE_FP8, 300), x @ w.t()) < 4e-3
    for num_rows in (1, 20, 300):
        assert bits_equal(run(plan, num_rows), run(REFERENCE_FP8, num_rows)), num_rows


@pytest.mark.parametrize("silu_mul", [False, True])
def test_a_row_is_the_same_anywhere_among_any_neighbours(ops: CudaOps, hard: HardOperands, silu_mul: bool) -> None:
    dtype = torch.bfloat16
    expected = hard.run(REFERENCE_FP8, 4096, dtype, silu_mul=silu_mul)
    for start, count in ((0, 1), (5, 1), (4095, 1), (3, 16), (1000, 63), (77, 129), (2047, 1024)):
        rows = hard.rows[start : start + count]
        found = ops.linear_silu_mul(rows, hard.weight) if silu_mul else ops.linear(rows, hard.weight)
        assert bits_equal(found, expected[start : start + count]), (start, count)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 300])
@pytest.mark.parametrize("degree", [2, 3, 5, 8])
def test_column_shards_equal_the_whole(ops: CudaOps, hard: HardOperands, num_rows: int, degree: int) -> None:
    whole = ops.linear(hard.rows[:num_rows], hard.weight, out_dtype=torch.float32)
    values, scales = hard.weight.values_NP.view(torch.uint8).chunk(degree), hard.weight.scale.chunk(degree)
    shards = [ops.fp8.pack(v.view(torch.float8_e4m3fn), s) for v, s in zip(values, scales, strict=True)]
    parts = [ops.linear(hard.rows[:num_rows], shard, out_dtype=torch.float32) for shard in shards]
    assert bits_equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("plan", [REFERENCE_FP8, *PLANS], ids=lambda plan: f"{plan.kind}{plan.block_n}")
def test_a_broken_row_stays_alone(hard: HardOperands, plan: Fp8Plan) -> None:
    expected = hard.run(plan, 200, torch.float32)
    scales = split_rows(hard.rows, 1664, Scaling.CHANNEL)[1]
    before = scales[[7, 130]].clone()
    scales[[7, 130]] = torch.nan
    found = hard.run(plan, 200, torch.float32)
    scales[[7, 130]] = before
    sound = torch.ones(200, dtype=torch.bool, device="cuda")
    sound[[7, 130]] = False
    assert bool(found[~sound].isnan().all())
    assert bits_equal(found[sound], expected[sound])


def test_bias_is_added_before_the_one_rounding(ops: CudaOps, hard: HardOperands) -> None:
    bias = torch.randn(1008, device="cuda", dtype=torch.bfloat16)
    for num_rows in (1, 40, 512):
        fp32 = hard.run(REFERENCE_FP8, num_rows, torch.float32)
        for plan in PLANS:
            out = torch.full((num_rows, 1008), float("nan"), device="cuda", dtype=torch.bfloat16)
            ops.fp8.run_linear(hard.rows[:num_rows], hard.weight, bias, out, plan, silu_mul=False)
            assert bits_equal(out, (fp32 + bias.float()).bfloat16()), plan


def test_swiglu_is_the_same_in_one_kernel_and_in_two(ops: CudaOps, hard: HardOperands) -> None:
    for num_rows in (1, 40, 300):
        fused = hard.run(COPY_ENGINE, num_rows, torch.bfloat16, silu_mul=True)
        both = ops.linear(hard.rows[:num_rows], hard.weight)
        for scaling in Scaling:
            separate = fp8_launch.silu_mul_quantize(both, scaling)
            assert same_rows(separate, quantize_rows(fused, scaling), 504, scaling)


def ops_with(plan: Fp8Plan) -> CudaOps:
    """Operations where one plan serves every FP8 product."""
    ops = CudaOps(torch.device("cuda"))
    entries = tuple(
        Fp8Entry(out_features=1, in_features=1, max_rows=1, silu_mul=silu_mul, plan=plan) for silu_mul in (False, True)
    )
    ops.fp8.plans = Fp8PlanIndex(Fp8Table(device="test", linear=entries))
    return ops


@pytest.mark.parametrize("plan", [None, *PLANS, Fp8Plan(kind="separate")], ids=str)
def test_every_probe_equals_the_reference_plan(plan: Fp8Plan | None) -> None:
    ops, reference = CudaOps(torch.device("cuda")) if plan is None else ops_with(plan), ops_with(REFERENCE_FP8)
    assert differing_probes(ops, reference, FP8_PROBES) == {}
    for probe in FP8_PROBES:
        if probe.name.startswith("fp8 layers"):
            outputs = probe.run(ops)
            assert bits_equal(outputs[0], outputs[1]), "quantised where it is made, and later"
    assert [refusal for refusal in ops.admission.refusals if not refusal.startswith(("cublaslt", "library"))] == []


def test_library_products_of_the_table_equal_ours(ops: CudaOps) -> None:
    """Each shape and row count where the table lets torch._scaled_mm serve."""
    entries = [entry for entry in ops.fp8.plans.entries() if entry.plan.kind == "library"]
    found = {}
    for entry in entries:
        rows = min(entry.max_rows, 2048)
        for reveals_order in (False, True):
            layer = HardOperands(
                ops.fp8, entry.out_features, entry.in_features, rows, seed=4, reveals_order=reveals_order
            )
            differing = num_differing(
                layer.run(entry.plan, rows, torch.bfloat16), layer.run(REFERENCE_FP8, rows, torch.bfloat16)
            )
            if differing:
                found[entry, reveals_order] = differing
    assert not found


def test_graph_equals_eager(ops: CudaOps, hard: HardOperands) -> None:
    x = torch.randn((64, 1664), device="cuda", dtype=torch.bfloat16)
    for num_rows in (1, 64):
        call = partial(ops.linear, x[:num_rows], hard.weight)
        assert bits_equal(in_graph(call), call())


def test_planted_other_order_of_groups_is_found(
    revealing: HardOperands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = revealing.run(REFERENCE_FP8, 64, torch.float32, chain=1)  # which fills nothing up
    broken = fp8_linear
    for load in ("x = tl.load(x_ptrs + group * GROUP_K", "w = tl.load(w_ptrs + group * GROUP_K"):
        broken = mutated(broken, load, load.replace("group *", "(K // GROUP_K - 1 - group) *"), tmp_path)
    monkeypatch.setattr(fp8_launch, "fp8_linear", broken)
    assert num_differing(revealing.run(REFERENCE_FP8, 64, torch.float32, chain=1), expected) > 1000


def test_block_weights_round_trip_through_pack(ops: CudaOps) -> None:
    weight_NK = torch.randn((256, 700))
    values, scale = quantize_weight_blocks(weight_NK, 32)
    packed = ops.fp8.pack(values, scale)
    assert (packed.out_features, packed.in_features, packed.scale_rows) == (256, 700, 32)
    assert torch.equal(packed.values_NP.cpu()[:, :700].view(torch.uint8), values.view(torch.uint8))
    assert not bool(packed.values_NP[:, 700:].view(torch.uint8).any())
