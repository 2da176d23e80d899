"""What the sustained comparison makes of its measurements: a table with the plans that were faster, and no others."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import fp8_vet, tables
from benchmarks.gpu.clocks import UNKNOWN
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.sustained_fp8 import Cell, offered, wanted_jobs, with_faster_plans
from benchmarks.gpu.turns import Turns
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, load_fp8_plans

OLD = Fp8Plan(kind="tma", block_m=128, block_n=128, num_warps=8, num_stages=4)
RINGS = [Fp8Plan(kind="rings", block_m=128, block_n=128, num_stages=4, lead=lead) for lead in (0, 1)]
LIBRARY = Fp8Plan(kind="library")


def entry(rows: int, plan: Fp8Plan = OLD, *, silu_mul: bool = False, otherwise: Fp8Plan | None = None) -> Fp8Entry:
    return Fp8Entry(
        out_features=512, in_features=256, max_rows=rows, silu_mul=silu_mul, plan=plan, otherwise=otherwise
    )  # fmt: skip


def turns(*milliseconds: float) -> list[Turns]:
    return [Turns([each], [UNKNOWN]) for each in milliseconds]


def test_only_faster_plans_of_measured_cells_are_taken() -> None:
    plain, fused = Layer("plain", 512, 256), Layer("fused", 1024, 256, silu_mul=True)
    cells = [
        Cell(plain, 512, [LIBRARY, *RINGS], turns(3.0, 2.0, 1.0)),
        Cell(plain, 1024, [OLD, *RINGS], turns(1.0, 1.1, 1.2)),
        Cell(fused, 512, [OLD, *RINGS], turns(3.0, 1.0, 2.0)),
        Cell(fused, 2048, [OLD], turns(3.0)),
    ]
    entries = [
        entry(64), entry(512, LIBRARY, otherwise=OLD), entry(1024), entry(512, silu_mul=True),
        entry(2048, silu_mul=True),
    ]  # fmt: skip
    found = with_faster_plans(entries, cells)
    assert found == [entries[0], entry(512, RINGS[1]), entries[2], entry(512, RINGS[0], silu_mul=True), entries[4]]


def test_rows_that_the_table_does_not_tell_apart_get_no_entry() -> None:
    cells = [Cell(Layer("plain", 512, 256), rows, [OLD, *RINGS], turns(3.0, 2.0, 1.0)) for rows in (128, 256, 512)]
    assert with_faster_plans([entry(256), entry(1024)], cells) == [entry(256, RINGS[1]), entry(1024)]


def test_the_step_s_tuner_puts_plans_of_other_row_counts_between_the_table_s() -> None:
    plain = Layer("plain", 512, 256)
    entries = [entry(64), entry(256, LIBRARY, otherwise=OLD)]
    found = tables.with_plans(entries, {(plain, 160): RINGS[0], (plain, 256): RINGS[1]}, Fp8Entry)
    assert found == [entries[0], entry(160, RINGS[0]), entry(256, RINGS[1])]


def test_a_plan_in_several_kernels_stays() -> None:
    separate = entry(128, Fp8Plan(kind="separate"), silu_mul=True)
    cell = Cell(Layer("fused", 1024, 256, silu_mul=True), 128, [OLD, *RINGS], turns(3.0, 2.0, 1.0))
    assert with_faster_plans([separate], [cell]) == [separate]


@pytest.mark.parametrize("silu_mul", [False, True])
def test_few_rows_have_all_kinds_and_many_rows_rings(silu_mul: bool) -> None:
    for rows in (128, 256, 512, 1024):
        assert {plan.kind for plan in offered(rows, silu_mul=silu_mul)} == {"rings", "tma"}
    assert {plan.kind for plan in offered(2048, silu_mul=silu_mul)} == {"rings"}


def test_all_that_competes_is_tried_by_a_child_first() -> None:
    assert wanted_jobs() <= set(fp8_vet.all_jobs())


def test_the_table_s_own_plans_are_compiled_by_children_too() -> None:
    for found in load_fp8_plans("NVIDIA H200").entries():
        if found.max_rows >= 128 and found.plan.kind != "separate":
            assert (found.silu_mul, found.plan) in wanted_jobs()
