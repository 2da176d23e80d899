"""Experts on the CPU: the choice, its weights, each row through its experts, and nothing else in the result."""

from __future__ import annotations

import pytest
import torch

from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.mutations import MUTANTS
from cluster.engine.kernels.probe_lists import MOE_PROBES
from cluster.engine.kernels.probes import Magnitudes, first_difference
from cluster.engine.kernels.probes_moe import combine_probe, expert_rows_case, random_choice, router_logits
from cluster.engine.kernels.registry import bits
from tests.unit.kernel_variants import ALL_VARIANTS, class_of, expected_outputs, native


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_native_experts_have_the_bits_of_the_reference(variant: str) -> None:
    for probe in MOE_PROBES:
        difference = first_difference(probe.run(native(variant)), expected_outputs(probe, class_of(variant)))
        assert difference is None, f"{probe.name}: {difference}"


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_many_rows_equal_each_row_through_its_linear_layers(variant: str) -> None:
    ops = native(variant)
    for case in (expert_rows_case(1, 3, 32, 64), expert_rows_case(50, 7, 40, 96)):
        assert case.difference(ops, ops) is None


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_choice_is_the_softmax_with_ties_to_the_lower_index(renormalise: bool) -> None:
    ops = native("fma_portable")
    logits = router_logits(60, 48, seed=2)
    choice = ops.moe_route(logits, 6, renormalise=renormalise)
    assert choice.experts_TJ.dtype == torch.int32
    exact, rounded = logits.double().softmax(dim=1), ops.softmax(logits)  # two logits may differ and these not
    for row in range(62):
        order = sorted((-probability, expert) for expert, probability in enumerate(rounded[row].tolist()))
        experts = sorted(expert for _, expert in order[:6])
        assert choice.experts_TJ[row].tolist() == experts
        wanted = exact[row, experts] / exact[row, experts].sum() if renormalise else exact[row, experts]
        assert torch.allclose(choice.weights_TJ[row].double(), wanted, rtol=1e-6, atol=1e-12)
    assert choice.experts_TJ[60].tolist() == [0, 1, 2, 3, 4, 5]
    for broken in (62, 63, 64):
        assert choice.weights_TJ[broken].isnan().all()
        assert choice.experts_TJ[broken].tolist() == [0, 1, 2, 3, 4, 5]
    alone = torch.cat(
        [ops.moe_route(logits[row : row + 1], 6, renormalise=renormalise).weights_TJ for row in range(65)]
    )
    assert torch.equal(bits(alone), bits(choice.weights_TJ))


def test_a_broken_row_stays_alone() -> None:
    ops = native("fma_portable")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((30, 64), generator=generator).bfloat16()
    gate_up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in ((4, 96, 64), (4, 64, 48)))
    experts = random_choice(30, 4, 2, seed=3)
    packed = ops.pack_experts(gate_up), ops.pack_experts(down)
    sound = ops.moe_experts(x, experts, *packed)
    x[11] = torch.nan
    broken = ops.moe_experts(x, experts, *packed)
    others = torch.arange(30) != 11
    assert torch.equal(broken[others], sound[others])
    assert broken[11].isnan().all()
    weights = torch.rand((30, 2), generator=generator)
    combined = ops.moe_combine(broken, weights)
    assert torch.equal(combined[others], ops.moe_combine(sound, weights)[others])
    assert combined[11].isnan().all()


def test_an_empty_step_is_fine() -> None:
    ops = native("fma_portable")
    packed = (
        ops.pack_experts(torch.zeros((4, 96, 64)).bfloat16()),
        ops.pack_experts(torch.zeros((4, 64, 48)).bfloat16()),
    )
    choice = ops.moe_route(torch.empty((0, 4)), 2, renormalise=True)
    rows = ops.moe_experts(torch.empty((0, 64)).bfloat16(), choice.experts_TJ, *packed)
    assert ops.moe_combine(rows, choice.weights_TJ).shape == (0, 64)


@pytest.mark.parametrize(("rows", "is_equal"), [(1, False), (4, True)])
def test_a_single_row_combined_by_falling_weight_is_noticed(rows: int, is_equal: bool) -> None:
    """The data reveals an order: the mutant is as accurate as the right one."""
    ops = ReferenceOps(InstructionClass.FMA)
    probe = combine_probe(rows, 8, 100, Magnitudes.WIDE)
    difference = first_difference(probe.run(MUTANTS["moe"](ops)), probe.run(ops))
    assert (difference is None) == is_equal
