"""Which plan serves which shape: the table of a device, its gaps, and libraries it was not measured with."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from cluster.engine.kernels import get_ops
from cluster.errors import ConfigError

pytest.importorskip("triton")

from benchmarks.gpu.candidates import candidates
from cluster.engine.kernels.triton.plans import LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex, PlanTable, load_plan_index, unmeasured_plan

LIBRARY = LinearPlan(kind="cublaslt")


def entry(n: int, k: int, rows: int, plan: LinearPlan, silu_mul: bool = False) -> LinearEntry:
    return LinearEntry(out_features=n, in_features=k, max_rows=rows, silu_mul=silu_mul, plan=plan)


def test_the_smallest_bound_that_holds_the_rows_serves_and_the_largest_all_above() -> None:
    plans = [LinearPlan(block_n=32 * i) for i in (1, 2, 4)]
    index = PlanIndex(PlanTable(device="x", linear=tuple(entry(64, 64, 4**i, plans[i]) for i in (2, 0, 1))))
    found = [index.linear(64, 64, rows, silu_mul=False) for rows in (1, 2, 4, 5, 16, 17, 10**6)]
    assert found == [plans[i] for i in (0, 1, 1, 2, 2, 2, 2)]


def test_an_unmeasured_weight_takes_the_nearest_one_s_plans() -> None:
    """The library's too: it is compared before it serves a product, see test_admission in tests/gpu."""
    own = LinearPlan(block_n=128)
    linear = (entry(4096, 4096, 16, own), entry(4096, 4096, 512, LIBRARY), entry(100, 100, 16, own))
    index = PlanIndex(PlanTable(device="x", linear=linear))
    assert index.linear(4096, 4096, 100, silu_mul=False) == LIBRARY
    assert index.linear(4000, 4096, 1, silu_mul=False) == own
    assert index.linear(4000, 4096, 100, silu_mul=False) == LIBRARY
    assert index.linear(4096, 4096, 100, silu_mul=True) == unmeasured_plan(100)


def test_the_committed_table_covers_all_row_counts() -> None:
    index = load_plan_index("NVIDIA H200")
    shapes = {(e.out_features, e.in_features, e.silu_mul) for e in index.entries()}
    assert len(shapes) == 12
    bounds = [e.max_rows for e in index.entries() if (e.out_features, e.in_features) == (6144, 4096)]
    assert bounds == sorted(bounds)
    assert {2**i for i in range(14)} <= set(bounds)


def test_a_device_with_the_same_multiprocessors_shares_the_table() -> None:
    assert load_plan_index("NVIDIA H100 80GB HBM3").entries() == load_plan_index("NVIDIA H200").entries()


@pytest.mark.parametrize("silu_mul", [False, True])
def test_every_row_count_has_candidates_of_the_kernels_meant_for_it(silu_mul: bool) -> None:
    for num_rows in (1, 8, 33, 64, 96, 128, 160, 192, 256, 8192):
        offered = candidates(num_rows, silu_mul=silu_mul)
        kinds = {plan.kind for plan in offered}
        assert ("stream" in kinds) == (num_rows <= 128)
        assert ("hopper" in kinds) == (num_rows > 64)
        if 64 < num_rows <= 256:
            heights = {plan.block_m for plan in offered if plan.kind == "hopper" and plan.block_n == 64}
            assert len(heights) == 1, "a tile holds all rows: the weight is read once"
            assert num_rows <= min(heights)
        streams = [plan for plan in offered if plan.kind == "stream"]
        least = min(num_rows, 64)
        assert all(least <= plan.block_m for plan in streams), "the weight is read once, above 64 rows at most twice"
        assert len(set(offered)) == len(offered)


def test_a_device_without_a_table_runs_on_defaults() -> None:
    index = load_plan_index("Some GPU")
    assert index.linear(4096, 4096, 8, silu_mul=False).swap
    assert index.linear(4096, 4096, 10**5, silu_mul=False).kind == "chain"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_asking_for_a_gpu_where_there_is_none_names_the_field() -> None:
    with pytest.raises(ConfigError, match="device: 'cuda:1' was asked for"):
        get_ops("cuda:1")


@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "stream", "block_m": 64, "block_n": 72},  # a tail of 8
        {"kind": "stream", "block_m": 64, "block_n": 112},  # three parts
        {"kind": "stream", "block_m": 32, "block_n": 48},
        {"kind": "stream", "block_m": 64, "block_n": 80, "swap": True},
        {"kind": "hopper", "block_m": 160},
        {"kind": "hopper", "block_m": 128, "block_k": 128},
        {"kind": "hopper", "block_m": 128, "num_stages": 1},
    ],
    ids=str,
)
def test_a_tile_that_would_end_the_compiler_s_process_is_no_plan(shape: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tile"):
        LinearPlan(**shape)
    with pytest.raises(msgspec.ValidationError, match="tile"):
        msgspec.convert(shape, LinearPlan)
