"""The kernels for experts in Triton's interpreter: indexing, masks and formulas, as `triton_interpret_cases.py`."""

from __future__ import annotations

import pytest
import torch

from cluster.engine.kernels.probes_moe import random_choice, router_logits
from cluster.engine.kernels.triton import moe_launch
from cluster.engine.kernels.triton.moe_plans import REFERENCE_MOE, GroupedPlan, MoePlan
from tests.gpu.support import relative_error

SMALL = GroupedPlan(block_n=32, block_k=32, num_stages=1)
PLANS = {
    "few": MoePlan(kind="few", block_m=32, gate_up=SMALL, down=SMALL),
    "swapped": MoePlan(kind="grouped", block_m=16, gate_up=SMALL, down=SMALL),
    "plain": MoePlan(
        kind="grouped",
        block_m=16,
        gate_up=GroupedPlan(block_n=16, block_k=16, swap=False, group_m=2),
        down=GroupedPlan(block_n=64, block_k=32, swap=False, persistent=True),
    ),
    "tma": MoePlan(
        kind="grouped",
        block_m=16,
        gate_up=GroupedPlan(block_n=16, block_k=32, swap=False, tma=True, persistent=True),
        down=GroupedPlan(block_n=32, block_k=16, swap=True, tma=True),
    ),
}


def expected(
    x: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, first: int
) -> torch.Tensor:
    """(T, J, K) in float64, NaN for experts that are not there."""
    result = torch.full((*experts.shape, down.shape[1]), torch.nan, dtype=torch.float64)
    for row, chosen in enumerate(experts.tolist()):
        for j, expert in enumerate(chosen):
            if not 0 <= expert - first < len(down):
                continue
            gate, up = (gate_up[expert - first].double() @ x[row].double()).chunk(2)
            active = (gate / (1 + torch.exp(-gate)) * up).half()
            result[row, j] = down[expert - first].double() @ active.double()
    return result


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("hidden", "features"), [(40, 24), (33, 17)])
@pytest.mark.parametrize(("rows", "first"), [(1, 0), (2, 0), (30, 0), (30, 2)])
def test_experts(name: str, hidden: int, features: int, rows: int, first: int) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, hidden).half()
    gate_up = (torch.randn(6, 2 * features, hidden) * hidden**-0.5).half()[first:]
    down = (torch.randn(6, hidden, features) * features**-0.5).half()[first:]
    experts = random_choice(rows, 6, 3, seed=rows)
    out = moe_launch.run_experts(
        x, experts, gate_up, down, PLANS[name], first_expert=first, num_programs=3, out_dtype=torch.float32
    )
    is_here = (experts >= first)[:, :, None].expand_as(out)
    wanted = expected(x, experts, gate_up, down, first)
    assert relative_error(out[is_here], wanted[is_here]) < 1e-3


@pytest.mark.parametrize("name", ["few", "swapped", "tma"])
def test_a_row_of_nan_and_unused_places_reach_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(20, 40).half(), random_choice(20, 6, 2, seed=4)
    gate_up, down = torch.randn(6, 48, 40).half(), torch.randn(6, 40, 24).half()
    x[7] = torch.nan
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        fresh: torch.Tensor = empty(*size, **options)  # type: ignore[call-overload]
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh.fill_(2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    out = moe_launch.run_experts(x, experts, gate_up, down, PLANS[name], num_programs=2)
    others = torch.arange(20) != 7
    assert out[7].isnan().all()
    assert relative_error(out[others], expected(x, experts, gate_up, down, 0)[others]) < 1e-3


@pytest.mark.parametrize(("rows", "num_experts", "block_m"), [(1, 3, 16), (70, 5, 16), (150, 40, 64)])
def test_grouping_is_a_stable_sort_into_tiles(rows: int, num_experts: int, block_m: int) -> None:
    experts = random_choice(rows, num_experts, 3, seed=rows)
    grouping = moe_launch.run_grouping(experts, num_experts - 1, 1, block_m)
    tiles = int(grouping.num_tiles)
    assert tiles <= grouping.max_tiles
    found: dict[int, list[int]] = {}
    for tile in range(tiles):
        used = int(grouping.tile_rows[tile])
        assert 0 < used <= block_m
        pairs = grouping.order[tile * block_m : tile * block_m + used].tolist()
        found.setdefault(int(grouping.tile_expert[tile]), []).extend(pairs)
    flat = experts.flatten().tolist()
    assert list(found) == sorted(found)
    assert found == {
        expert: [pair for pair, chosen in enumerate(flat) if chosen == expert + 1]
        for expert in range(num_experts - 1)
        if expert + 1 in flat
    }


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 6)])
def test_route(num_experts: int, top_k: int, renormalise: bool) -> None:
    logits = router_logits(40, num_experts, seed=1)
    experts, weights = moe_launch.run_route(logits, top_k, renormalise=renormalise)
    exact = logits.double().softmax(dim=1)
    for row in range(42):
        probabilities = exact[row].float().tolist()
        ranked = sorted(range(num_experts), key=lambda expert: (-probabilities[expert], expert))
        assert experts[row].tolist() == sorted(ranked[:top_k]), row
        wanted = exact[row, experts[row].long()]
        wanted = wanted / wanted.sum() if renormalise else wanted
        assert torch.allclose(weights[row].double(), wanted, rtol=1e-5, atol=1e-12)
    assert experts[42:].tolist() == [list(range(top_k))] * 3
    assert weights[42:].isnan().all()


def test_combine_adds_in_the_order_of_the_experts() -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(5, 3, 70), torch.rand(5, 3)
    total = torch.zeros(5, 70, dtype=torch.float64)
    for j in range(3):
        total = (total + rows[:, j].double() * weights[:, j, None].double()).float().double()
    out = moe_launch.run_combine(rows, weights, torch.float32)
    assert relative_error(out, total) < 1e-7


def test_impossible_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4 experts"):
        moe_launch.run_route(torch.zeros(2, 4), 5, renormalise=True)
    weights = torch.zeros(4, 32, 16).half(), torch.zeros(4, 16, 16).half()
    experts = random_choice(33, 4, 2, seed=0)
    with pytest.raises(ValueError, match="at most 32 rows cannot serve 33"):
        moe_launch.run_experts(torch.zeros(33, 16).half(), experts, *weights, PLANS["few"])
    assert moe_launch.run_experts(torch.zeros(0, 16).half(), experts[:0], *weights, REFERENCE_MOE).shape == (0, 2, 16)
