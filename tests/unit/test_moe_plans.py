"""Plans of the experts' kernels: looked up by shape and rows, kept as data, and possible to launch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("triton")

from benchmarks.gpu.moe import ROW_COUNTS, SHAPES, write_table
from benchmarks.gpu.moe_candidates import tilings, whole_plans
from cluster.engine.kernels.triton.moe_plans import (
    MoeEntry,
    MoePlanIndex,
    MoeShape,
    MoeTable,
    load_moe_plan_index,
    unmeasured_moe_plan,
)

QWEN = SHAPES["qwen3-30b-a3b"]
ODD = MoeShape(num_experts=11, top_k=3, hidden=200, features=72)
PLANS = [unmeasured_moe_plan(QWEN, rows) for rows in (1, 32, 4096)]
TABLE = MoeTable(
    device="test",
    entries=tuple(
        MoeEntry(shape=QWEN, max_rows=rows, plan=plan) for rows, plan in zip((16, 32, 512), PLANS, strict=True)
    ),
)


def test_measured_plans_serve_up_to_their_rows() -> None:
    index = MoePlanIndex(TABLE)
    assert [index.plan(QWEN, rows) for rows in (1, 16, 17, 33, 10**6)] == [PLANS[0], *PLANS, PLANS[2]]
    few = MoePlanIndex(MoeTable(device="test", entries=TABLE.entries[:2]))
    assert few.plan(QWEN, 33) == unmeasured_moe_plan(QWEN, 33)
    assert index.plan(ODD, 5) == unmeasured_moe_plan(ODD, 5)
    assert load_moe_plan_index("A device nobody measured").plan(QWEN, 1) == PLANS[0]


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "table.json")
    assert msgspec.json.decode((tmp_path / "table.json").read_bytes(), type=MoeTable) == TABLE


@pytest.mark.parametrize("shape", [*SHAPES.values(), ODD])
def test_plans_to_try_fit_the_rows_and_the_shared_memory(shape: MoeShape) -> None:
    for num_rows in (*ROW_COUNTS, 16, 17, 33, 100_000):
        plans = list(whole_plans(shape, num_rows))
        assert {(plan.kind, plan.block_m) for plan in plans} == set(tilings(shape, num_rows))
        for plan in (*plans, unmeasured_moe_plan(shape, num_rows)):
            assert plan.kind == "grouped" or num_rows <= plan.block_m
            for gemm, weights in ((plan.gate_up, 2), (plan.down, 1)):
                stage = (plan.block_m + weights * gemm.block_n) * gemm.block_k * 2
                assert gemm.num_stages * stage <= 227 * 1024
