"""Norms, embedding, softmax: canonical bits, and right."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.engine.kernels.cpu import arithmetic
from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.probe_lists import EMBEDDING_PROBES, NORM_PROBES, SOFTMAX_PROBES
from cluster.engine.kernels.probes import Magnitudes, first_difference, norm_probe, softmax_probe
from tests.unit.kernel_variants import ALL_VARIANTS, class_of, expected_outputs, native


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_native_rows_have_the_bits_of_the_reference(variant: str) -> None:
    probes = [norm_probe(2, width, Magnitudes.WIDE) for width in (1, 15, 16, 17, 4096)]
    probes += [softmax_probe(1, size) for size in (1, 16, 33)]
    for probe in (*probes, *NORM_PROBES, *EMBEDDING_PROBES, *SOFTMAX_PROBES):
        difference = first_difference(probe.run(native(variant)), expected_outputs(probe, class_of(variant)))
        assert difference is None, f"{probe.name}: {difference}"


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_rows_do_not_depend_on_batch_or_threads(variant: str, num_threads: int) -> None:
    ops, alone = native(variant, num_threads), native(variant, 1)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((64, 1000), generator=generator) * 5
    weight = torch.rand(1000, generator=generator)
    normed, weights, sums = ops.rms_norm(x, weight, 1e-5), ops.softmax(x), ops.log_softmax_stats(x)[1]
    for row in (0, 1, 31, 63):
        assert torch.equal(alone.rms_norm(x[row : row + 1], weight, 1e-5)[0], normed[row])
        assert torch.equal(alone.softmax(x[row : row + 1])[0], weights[row])
        assert torch.equal(alone.log_softmax_stats(x[row : row + 1])[1][0], sums[row])


@pytest.mark.parametrize("variant", [*ALL_VARIANTS, None])
def test_a_step_that_draws_nothing_has_no_rows(variant: str | None) -> None:
    """A reference serves where a kernel is refused, so it must take whatever a kernel takes."""
    ops = ReferenceOps(InstructionClass.FMA) if variant is None else native(variant)
    none, weight = torch.empty((0, 100)), torch.ones(100)
    packed = ops.pack_linear(torch.ones((64, 100)).bfloat16())
    assert ops.rms_norm(none, weight, 1e-5).shape == (0, 100)
    assert ops.add_rms_norm(none.clone(), none, weight, 1e-5).shape == (0, 100)
    assert ops.linear(none.bfloat16(), packed).shape == (0, 64)
    assert ops.linear_silu_mul(none.bfloat16(), packed).shape == (0, 32)
    assert ops.softmax(none).shape == (0, 100)
    assert [each.shape for each in ops.log_softmax_stats(none)] == [(0,), (0,)]
    assert ops.argmax(none).shape == (0,)


def test_norms_and_softmax_are_right() -> None:
    ops = native("fma_portable")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((5, 300), generator=generator) * 3
    weight = torch.rand(300, generator=generator)
    wide = x.double()
    exact = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5).double(), exact, rtol=2**-8, atol=0)
    best, log_sum = ops.log_softmax_stats(x)
    assert torch.equal(best, x.amax(1))
    assert torch.allclose(log_sum.double(), wide.logsumexp(1), rtol=1e-6)
    assert torch.allclose(ops.softmax(x).double(), wide.softmax(1), rtol=1e-5, atol=1e-12)
    gate_up = torch.randn((32, 64), generator=generator).bfloat16()
    rows = torch.randn((3, 64), generator=generator).bfloat16()
    gate, up = (rows.double() @ gate_up.double().t()).chunk(2, dim=1)
    silu = ops.linear_silu_mul(rows, ops.pack_linear(gate_up)).double()
    assert torch.allclose(silu, torch.nn.functional.silu(gate) * up, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_argmax_prefers_the_lower_id_and_ignores_nan(variant: str) -> None:
    ops = native(variant)
    logits = torch.full((6, 50), -1.0)
    logits[0, [17, 33, 49]] = 2.0  # same and different lanes
    logits[1, 49] = 0.0
    logits[2] = -torch.inf
    logits[3, :40] = torch.nan
    logits[4] = torch.nan
    logits[5, [3, 19]] = torch.inf
    assert ops.argmax(logits).tolist() == [17, 49, 0, 40, 0, 3]
    wide = torch.full((6, 128), 9.0)
    wide[:, :50] = logits
    assert ops.argmax(wide[:, :50]).tolist() == [17, 49, 0, 40, 0, 3]  # rows with a stride


def test_exp_is_accurate_and_exact_at_the_ends() -> None:
    x = torch.linspace(arithmetic.EXP_LOWEST, arithmetic.EXP_HIGHEST, 200_001)
    exact = x.double().exp()
    assert float(((arithmetic.exp(x).double() - exact) / exact).abs().max()) < 2**-23
    ends = torch.tensor([0.0, -0.0, -math.inf, math.inf, math.nan, -87.4, 88.4])
    result = arithmetic.exp(ends)
    assert result[:4].tolist() == [1.0, 1.0, 0.0, math.inf]
    assert result[4].isnan()
    assert result[5:].tolist() == [0.0, math.inf]


def test_fma_rounds_once() -> None:
    # 1 + 2**-23 squared is 1 + 2**-22 + 2**-46: two roundings lose the last term.
    a = torch.tensor([1 + 2.0**-23])
    assert arithmetic.fma(a, a, torch.tensor([-1.0 - 2.0**-22])).item() == 2.0**-46
    # 2**-24 above 1 is a tie; a product of 2**-80 breaks it upwards, which float64 alone cannot see.
    tie = torch.tensor([2.0**-40])
    half = torch.tensor([1.0 + 2.0**-23])
    assert arithmetic.fma(tie, tie, half).item() == 1.0 + 2.0**-23
    product = arithmetic.fma(torch.tensor([1.0 + 2.0**-12]), torch.tensor([2.0**-24 - 2.0**-36]), torch.tensor([1.0]))
    assert product.item() == 1.0  # 2**-24 - 2**-48: just below the tie
