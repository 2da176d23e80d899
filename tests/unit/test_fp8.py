"""FP8 arithmetic: the formula against exact fractions, rows that stay alone, shards, and the CPU's product."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from cluster.engine.kernels import fingerprint, fp8, get_ops
from cluster.engine.kernels.fp8 import Scaling, quantize_rows, quantize_weight, quantize_weight_blocks, split_rows
from cluster.engine.kernels.mutations import break_kernel
from cluster.engine.kernels.probe_lists import FP8_PROBES
from cluster.engine.kernels.probes import Magnitudes, draw, first_difference
from cluster.engine.kernels.registry import bits
from tests.unit.kernel_variants import native

ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FINITE_E4M3 = ALL_E4M3[ALL_E4M3.isfinite()]


def rounded(value: Fraction) -> float:
    """The fp32 number nearest to a fraction of normal size, ties to even."""
    exponent = math.floor(math.log2(abs(value)))
    unit = Fraction(2) ** (exponent - 23)
    return float(round(value / unit) * unit)  # round() of a fraction goes to even


def nearest_e4m3(value: float) -> float:
    """By search: the nearest number, of two equally near the one whose last bit is 0; none beyond 448."""
    magnitudes = sorted(set(FINITE_E4M3.abs().tolist()))
    best = min(magnitudes, key=lambda m: (abs(m - abs(value)), magnitudes.index(m) % 2))
    return math.copysign(best, value)


@pytest.mark.parametrize("magnitudes", Magnitudes)
def test_values_and_scales_follow_the_formula(magnitudes: Magnitudes) -> None:
    x = draw(torch.Generator().manual_seed(1), 6, 200, magnitudes)
    values, scales = split_rows(quantize_rows(x.bfloat16(), Scaling.CHANNEL), 200, Scaling.CHANNEL)
    assert values.shape == (6, 256)
    assert not bool(values[:, 200:].float().any())
    for row in range(6):
        amax = max(abs(Fraction(value)) for value in x[row].tolist())
        assert scales[row].item() == rounded(amax / 448)
        inverse = rounded(448 / amax)
        scaled = [rounded(Fraction(v) * Fraction(inverse)) if v else 0.0 for v in x[row].tolist()]
        assert values[row, :200].float().tolist() == [nearest_e4m3(value) for value in scaled]


def test_the_largest_value_of_a_row_is_represented_exactly() -> None:
    x = draw(torch.Generator().manual_seed(2), 300, 128, Magnitudes.WIDE).bfloat16()
    values, scales = split_rows(quantize_rows(x, Scaling.CHANNEL), 128, Scaling.CHANNEL)
    assert bool((values.float().abs().amax(1) == 448.0).all())
    restored = values.float().abs().amax(1) * scales[:, 0]
    assert torch.allclose(restored, x.float().abs().amax(1), rtol=2**-22, atol=0.0)


def test_every_e4m3_number_is_kept() -> None:
    """448 is in the row, so the scale is 1."""
    row = FINITE_E4M3.bfloat16()[None]
    values, scales = split_rows(quantize_rows(row, Scaling.CHANNEL), len(FINITE_E4M3), Scaling.CHANNEL)
    assert scales.item() == 1.0
    assert torch.equal(bits(values[0, : len(FINITE_E4M3)].float()), bits(FINITE_E4M3))  # -0 too


def test_rows_of_zeros_and_of_denormals_have_normal_scales() -> None:
    x = torch.zeros((4, 128))
    x[1, 3] = 2.0**-133  # the smallest denormal of bf16
    x[2] = 2.0**-126
    x[3, 0] = -0.0
    values, scales = split_rows(quantize_rows(x.bfloat16(), Scaling.CHANNEL), 128, Scaling.CHANNEL)
    assert scales[:, 0].tolist() == [rounded(Fraction(fp8.SMALLEST_AMAX) / 448)] * 4
    assert scales.min().item() > 2.0**-126
    assert not bool(values.float().any())


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_broken_value_makes_its_own_row_nan_and_no_other(scaling: Scaling, broken: float) -> None:
    ops = get_ops("cpu", 1)
    generator = torch.Generator().manual_seed(3)
    x = draw(generator, 5, 300, Magnitudes.NORMAL).bfloat16()
    weight_NK = draw(generator, 64, 300, Magnitudes.NORMAL)
    layer = quantize_weight_blocks(weight_NK, 64) if scaling is Scaling.BLOCK else quantize_weight(weight_NK)
    weight = ops.pack_fp8(*layer)
    expected = ops.linear(x, weight)
    x[2, 299] = broken
    rows = quantize_rows(x, scaling)
    assert not bool(split_rows(rows, 300, scaling)[0].float().isnan().any())  # the scale says it, not the values
    found = ops.linear(rows, weight)
    assert bool(found[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("scaling", Scaling)
def test_a_row_is_quantised_alone(scaling: Scaling) -> None:
    x = draw(torch.Generator().manual_seed(4), 40, 700, Magnitudes.WIDE).bfloat16()
    together = quantize_rows(x, scaling)
    assert together.shape == (40, fp8.row_bytes(700, scaling))
    assert together.shape[1] % 128 == 0
    for row in range(40):
        assert torch.equal(quantize_rows(x[row : row + 1], scaling)[0], together[row])
    assert torch.equal(quantize_rows(x.flip(0), scaling), together.flip(0))


def test_groups_of_a_row_have_scales_of_their_own() -> None:
    x = torch.ones((1, 300))
    x[0, 128:256] = 1e-3
    _, scales = split_rows(quantize_rows(x.bfloat16(), Scaling.BLOCK), 300, Scaling.BLOCK)
    amax = x.bfloat16().float()[0, [0, 128, 256]]
    assert torch.equal(scales[0], amax / torch.full((3,), 448.0))


@pytest.mark.parametrize("block_rows", [0, 32, 64])
@pytest.mark.parametrize("magnitudes", Magnitudes)
def test_shards_of_the_outputs_have_the_bits_of_the_whole(block_rows: int, magnitudes: Magnitudes) -> None:
    ops = get_ops("cpu", 1)
    generator = torch.Generator().manual_seed(5)
    x = draw(generator, 7, 333, magnitudes).bfloat16()
    weight_NK = draw(generator, 192, 333, magnitudes)

    def product(rows_NK: torch.Tensor) -> torch.Tensor:
        layer = quantize_weight_blocks(rows_NK, block_rows) if block_rows else quantize_weight(rows_NK)
        return ops.linear(x, ops.pack_fp8(*layer), out_dtype=torch.float32)

    whole = product(weight_NK)
    sizes = [64, 128] if block_rows else [1, 63, 50, 78]
    parts = [product(rows_NK) for rows_NK in torch.split(weight_NK, sizes)]
    assert first_difference((torch.cat(parts, dim=1),), (whole,)) is None


def exact_product(
    rows: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor], inputs: int, chain: int
) -> torch.Tensor:
    """One output element after the other: exact sums of `chain` groups, rounded once, added in ascending order."""
    values, scales = split_rows(rows, inputs, Scaling.CHANNEL)
    out = torch.empty((len(rows), len(weight[0])))
    for t in range(out.shape[0]):
        for n in range(out.shape[1]):
            acc = torch.tensor(0.0)
            for start in range(0, inputs, 128 * chain):
                stop = start + 128 * chain
                pairs = zip(values[t, start:stop].tolist(), weight[0][n, start:stop].tolist())  # noqa: B905 - one is padded
                exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
                acc = acc + torch.tensor(rounded(exact) if exact else 0.0)
            out[t, n] = (acc * scales[t, 0]) * weight[1][n]
    return out


@pytest.mark.parametrize("chain", [1, 2, 4])
@pytest.mark.parametrize("magnitudes", [Magnitudes.WIDE, Magnitudes.CANCELLING])
def test_the_product_is_that_of_exact_sums(magnitudes: Magnitudes, chain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "CHANNEL_CHAIN", chain)
    ops = get_ops("cpu", 1)
    generator = torch.Generator().manual_seed(6)
    rows = quantize_rows(draw(generator, 3, 450, magnitudes).bfloat16(), Scaling.CHANNEL)
    weight = quantize_weight(draw(generator, 9, 450, magnitudes))
    found = ops.linear(rows, ops.pack_fp8(*weight), out_dtype=torch.float32)
    assert torch.equal(found, exact_product(rows, weight, 450, chain))


@pytest.mark.parametrize("block_rows", [0, 64])
def test_the_error_is_that_of_e4m3(block_rows: int) -> None:
    ops = get_ops("cpu", 1)
    generator = torch.Generator().manual_seed(7)
    x, weight_NK = (
        torch.randn((64, 1024), generator=generator).bfloat16(),
        torch.randn((256, 1024), generator=generator),
    )
    layer = quantize_weight_blocks(weight_NK, block_rows) if block_rows else quantize_weight(weight_NK)
    exact = x.double() @ weight_NK.double().t()
    error = (ops.linear(x, ops.pack_fp8(*layer), out_dtype=torch.float32) - exact).norm() / exact.norm()
    assert 0.03 < error < 0.045  # 2.6 % for each factor
    restored = fp8.dequantize_weight(*layer)
    assert 0.02 < (restored - weight_NK).norm() / weight_NK.norm() < 0.03


def test_quantising_where_values_are_made_changes_no_bit() -> None:
    """The probes compute each chain of layers twice; the CPU's classes agree on all but the norm and SwiGLU."""
    for probe in FP8_PROBES:
        outputs = probe.run(get_ops("cpu", 1))
        if probe.name.startswith("fp8 layers"):
            assert first_difference((outputs[0],), (outputs[1],)) is None, probe.name


def test_a_bf16_and_an_fp8_worker_have_different_fingerprints() -> None:
    ops = get_ops("cpu", 1)
    assert fingerprint(ops, with_fp8=True) == fingerprint(get_ops("cpu", 3), with_fp8=True)
    assert fingerprint(ops, with_fp8=True) != fingerprint(ops)
    assert fingerprint(ops, with_fp8=True).split("/")[0] == fingerprint(ops).split("/")[0]


def test_the_length_of_chains_is_in_the_fingerprint_of_an_fp8_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = get_ops("cpu", 1)
    before = fingerprint(ops), fingerprint(ops, with_fp8=True)
    monkeypatch.setattr(fp8, "CHANNEL_CHAIN", 4)
    assert fingerprint(ops) == before[0]
    assert fingerprint(ops, with_fp8=True) != before[1]


def test_mutants_run_fp8_layers() -> None:
    for name in ("linear", "attention"):
        mutant = break_kernel(get_ops("cpu", 1), name)
        for probe in FP8_PROBES[-2:]:
            assert first_difference(probe.run(mutant), probe.run(get_ops("cpu", 1))) is None


def test_rows_of_another_layer_are_refused() -> None:
    ops = get_ops("cpu", 1)
    weight = ops.pack_fp8(*quantize_weight(torch.randn(16, 256)))
    with pytest.raises(AssertionError, match="quantised for another layer"):
        ops.linear(quantize_rows(torch.randn(2, 128).bfloat16(), Scaling.CHANNEL), weight)
    with pytest.raises(NotImplementedError):
        native("fma_portable").pack_fp8(*quantize_weight(torch.randn(16, 256)))
