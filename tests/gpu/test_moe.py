"""Experts: whatever plan, tile, neighbours and rank serve a row, it has the bits of its experts' linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.moe_candidates import whole_plans
from benchmarks.gpu.moe_inputs import MoeInputs
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.probe_lists import MOE_PROBES
from cluster.engine.kernels.probes_moe import router_logits
from cluster.engine.kernels.triton import moe, moe_launch
from cluster.engine.kernels.triton.moe_plans import (
    REFERENCE_MOE,
    MoePlan,
    MoePlanIndex,
    MoeShape,
    MoeTable,
    unmeasured_moe_plan,
)
from tests.gpu.support import NUM_MULTIPROCESSORS, bits_equal, in_graph, mutated, num_differing, relative_error
from tests.gpu.support_admission import differing_probes

QWEN = MoeShape(num_experts=128, top_k=8, hidden=2048, features=768)
WIDE = MoeShape(num_experts=8, top_k=2, hidden=1024, features=3584)  # Mixtral's proportions
ODD = MoeShape(num_experts=11, top_k=3, hidden=200, features=72)
ROWS = [1, 2, 7, 16, 17, 32, 33, 64, 100, 256, 512, 2048, 4096]


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


@pytest.fixture(scope="module", params=[QWEN, WIDE, ODD], ids=["qwen", "wide", "odd"])
def inputs(request: pytest.FixtureRequest) -> MoeInputs:
    return MoeInputs(request.param, max(ROWS))


@pytest.fixture(scope="module")
def expected(inputs: MoeInputs) -> torch.Tensor:
    return inputs.through_linear(inputs.x, inputs.experts)


def run(
    inputs: MoeInputs, x: torch.Tensor, experts: torch.Tensor, plan: MoePlan, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The accumulators themselves: a rounded result would hide most differences."""
    return moe_launch.run_experts(
        x, experts, inputs.gate_up, inputs.down, plan, num_programs=NUM_MULTIPROCESSORS, out_dtype=dtype
    )


def default_plan(inputs: MoeInputs, experts: torch.Tensor) -> MoePlan:
    return unmeasured_moe_plan(inputs.shape, len(experts))


def test_the_reference_is_right_in_float64(inputs: MoeInputs, expected: torch.Tensor) -> None:
    for row in (0, 5):
        for place, expert in enumerate(inputs.experts[row].tolist()):
            gate, up = (inputs.gate_up[expert].double() @ inputs.x[row].double()).chunk(2)
            active = gate / (1 + torch.exp(-gate)) * up
            assert relative_error(expected[row, place], inputs.down[expert].double() @ active) < 1e-2


@pytest.mark.parametrize("num_rows", ROWS)
def test_every_plan_has_the_bits_of_the_linear_layers(inputs: MoeInputs, expected: torch.Tensor, num_rows: int) -> None:
    x, experts = inputs.x[:num_rows], inputs.experts[:num_rows]
    every = 1 if inputs.shape == QWEN else 3
    plans = [REFERENCE_MOE, default_plan(inputs, experts), *list(whole_plans(inputs.shape, num_rows))[::every]]
    failed = {}
    for plan in dict.fromkeys(plans):
        differing = num_differing(run(inputs, x, experts, plan), expected[:num_rows])
        if differing:
            failed[plan] = differing
    assert not failed


@pytest.mark.parametrize("num_rows", [1, 24, 300, 2048])
def test_rounded_rows_are_the_rounded_chains(inputs: MoeInputs, expected: torch.Tensor, num_rows: int) -> None:
    x, experts = inputs.x[:num_rows], inputs.experts[:num_rows]
    out = run(inputs, x, experts, default_plan(inputs, experts), torch.bfloat16)
    assert bits_equal(out, expected[:num_rows].bfloat16())


@pytest.mark.parametrize("num_rows", [3, 30, 500, 4096])
def test_one_expert_may_get_all_rows(inputs: MoeInputs, num_rows: int) -> None:
    x = inputs.x[:num_rows]
    last = inputs.shape.num_experts - inputs.shape.top_k
    experts = (torch.arange(inputs.shape.top_k, device="cuda") + last).int().expand(num_rows, -1).contiguous()
    wanted = inputs.through_linear(x, experts)
    for plan in (default_plan(inputs, experts), REFERENCE_MOE):
        assert num_differing(run(inputs, x, experts, plan), wanted) == 0, plan


def test_a_row_is_the_same_at_any_position_among_any_neighbours(inputs: MoeInputs, expected: torch.Tensor) -> None:
    for start, count in ((4095, 1), (5, 1), (3, 16), (1000, 63), (77, 129), (2047, 1024)):
        rows = slice(start, start + count)
        x, experts = inputs.x[rows], inputs.experts[rows].contiguous()
        assert num_differing(run(inputs, x, experts, default_plan(inputs, experts)), expected[rows]) == 0, (
            start,
            count,
        )


@pytest.mark.parametrize("num_rows", [9, 200, 1500])
def test_a_row_of_nan_stays_alone(inputs: MoeInputs, expected: torch.Tensor, num_rows: int) -> None:
    x, experts = inputs.x[:num_rows].clone(), inputs.experts[:num_rows]
    x[num_rows // 2] = float("nan")
    out = run(inputs, x, experts, default_plan(inputs, experts))
    others = torch.arange(num_rows, device="cuda") != num_rows // 2
    assert bits_equal(out[others], expected[:num_rows][others])
    assert bool(out[num_rows // 2].isnan().all())


@pytest.mark.parametrize("num_rows", [2, 31, 900])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_some_experts_each_give_the_rows_of_one(
    inputs: MoeInputs, expected: torch.Tensor, num_rows: int, ranks: int
) -> None:
    x, experts = inputs.x[:num_rows], inputs.experts[:num_rows]
    total = inputs.shape.num_experts
    joined = torch.full_like(expected[:num_rows], float("nan"))
    for rank in range(ranks):
        start, stop = total * rank // ranks, total * (rank + 1) // ranks
        part = moe_launch.run_experts(
            x, experts, inputs.gate_up[start:stop], inputs.down[start:stop], default_plan(inputs, experts),
            first_expert=start, num_programs=NUM_MULTIPROCESSORS, out_dtype=torch.float32,
        )  # fmt: skip
        mine = (experts >= start) & (experts < stop)
        joined[mine] = part[mine]
    assert bits_equal(joined, expected[:num_rows])


@pytest.mark.parametrize("num_rows", [1, 24, 130, 2000])
def test_a_graph_serves_any_choice(inputs: MoeInputs, num_rows: int) -> None:
    """Captured with one choice of experts and replayed with others: nothing of it is on the host."""
    x, experts = inputs.x[:num_rows].clone(), inputs.experts[:num_rows].clone()
    plan = default_plan(inputs, experts)
    assert bits_equal(in_graph(lambda: run(inputs, x, experts, plan)), run(inputs, x, experts, plan))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs, x, experts, plan)
    all_to_some = torch.arange(inputs.shape.top_k, device="cuda").int().expand(num_rows, -1)
    for choice in (all_to_some, inputs.experts[-num_rows:]):
        experts.copy_(choice)
        x.copy_(inputs.x[-num_rows:])
        out.fill_(float("nan"))
        graph.replay()
        assert num_differing(out, inputs.through_linear(x, experts)) == 0


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (128, 8), (512, 10)])
def test_route(ops: CudaOps, num_experts: int, top_k: int, renormalise: bool) -> None:
    logits = router_logits(3000, num_experts, seed=top_k).cuda()
    choice = ops.moe_route(logits, top_k, renormalise=renormalise)
    experts, weights = choice.experts_TJ.long(), choice.weights_TJ
    sound = slice(0, 3002)
    exact = logits[sound].double().softmax(dim=1)
    wanted = exact.gather(1, experts[sound])
    if renormalise:
        wanted = wanted / wanted.sum(dim=1, keepdim=True)
    assert torch.allclose(weights[sound].double(), wanted, rtol=2e-5, atol=1e-12)
    assert bool((experts.diff(dim=1) > 0).all())
    # Equal logits have equal probabilities, so a tie is a tie here too: the lower index wins.
    ranked = logits[sound].cpu().argsort(dim=1, descending=True, stable=True)[:, :top_k].sort(dim=1).values
    differing = (ranked != experts[sound].cpu()).any(dim=1).nonzero().flatten().tolist()
    for row in differing:  # different logits, the same probability in fp32
        chosen, other = logits[row, experts[row]].min(), logits[row, ranked[row].cuda()].min()
        assert abs(float(chosen - other)) < 1e-4, row
    assert len(differing) < 10
    assert experts[3000].tolist() == list(range(top_k))
    assert experts[3002:].tolist() == [list(range(top_k))] * 3
    assert bool(weights[3002:].isnan().all())
    for start, count in ((0, 1), (3004, 1), (17, 300)):
        again = ops.moe_route(logits[start : start + count], top_k, renormalise=renormalise)
        assert bits_equal(again.experts_TJ, choice.experts_TJ[start : start + count])
        part = weights[start : start + count].nan_to_num(2.0)
        assert bits_equal(again.weights_TJ.nan_to_num(2.0), part)


@pytest.mark.parametrize("width", [100, 2048, 4096])
def test_combine_adds_in_the_order_of_the_experts(ops: CudaOps, width: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn((90, 8, width), device="cuda", dtype=torch.bfloat16)
    weights = torch.rand((90, 8), device="cuda")
    total = torch.zeros((90, width), device="cuda", dtype=torch.float64)
    for j in range(8):  # a product of 8 and 24 bits is exact in float64; rounding twice hits almost never
        total = (total + rows[:, j].double() * weights[:, j, None].double()).float().double()
    out = moe_launch.run_combine(rows, weights, torch.float32)
    assert num_differing(out, total.float()) <= 2
    assert bits_equal(ops.moe_combine(rows, weights), out.bfloat16())
    for start, count in ((0, 1), (89, 1), (3, 40)):
        assert bits_equal(
            moe_launch.run_combine(rows[start : start + count], weights[start : start + count], torch.float32),
            out[start : start + count],
        )
    order = weights.argsort(dim=1, descending=True)
    by_rank = moe_launch.run_combine(
        rows.gather(1, order[:, :, None].expand_as(rows)), weights.gather(1, order), torch.float32
    )
    assert num_differing(by_rank, out) > 0


def test_every_probe_equals_the_reference_plans(ops: CudaOps) -> None:
    reference = CudaOps(torch.device("cuda"))

    class Always(MoePlanIndex):
        def plan(self, shape: MoeShape, num_rows: int) -> MoePlan:
            return REFERENCE_MOE

    reference.moe_plans = Always(MoeTable(device="test"))
    assert differing_probes(ops, reference, MOE_PROBES) == {}
    assert [refusal for refusal in ops.admission.refusals if not refusal.startswith("cublaslt")] == []


@pytest.mark.parametrize("num_rows", [20, 300])
def test_planted_second_chain_is_found(num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = MoeInputs(QWEN, num_rows)
    expected = inputs.through_linear(inputs.x, inputs.experts)
    broken = mutated(
        moe, "            acc = tl.dot(b, a, acc)", "            even, acc = acc, tl.dot(b, a, even)", tmp_path
    )
    broken = mutated(
        broken, "    for k in range(0, K, BLOCK_K):\n", "    even = acc\n    for k in range(0, K, BLOCK_K):\n", tmp_path
    )
    broken = mutated(
        broken,
        "    if SILU_MUL:\n        acc = _sig",
        "    acc += even\n    if SILU_MUL:\n        acc = _sig",
        tmp_path,
    )
    monkeypatch.setattr(moe_launch, "moe", broken)
    plan = unmeasured_moe_plan(QWEN, num_rows)  # weights on the wide side
    assert plan.gate_up.swap
    assert num_differing(run(inputs, inputs.x, inputs.experts, plan), expected) > 0


def test_an_empty_step_is_fine(ops: CudaOps) -> None:
    gate_up = ops.pack_experts(torch.randn((4, 64, 32), device="cuda", dtype=torch.bfloat16))
    down = ops.pack_experts(torch.randn((4, 32, 32), device="cuda", dtype=torch.bfloat16))
    choice = ops.moe_route(torch.empty((0, 4), device="cuda"), 2, renormalise=True)
    rows = ops.moe_experts(torch.empty((0, 32), device="cuda", dtype=torch.bfloat16), choice.experts_TJ, gate_up, down)
    assert ops.moe_combine(rows, choice.weights_TJ).shape == (0, 32)
