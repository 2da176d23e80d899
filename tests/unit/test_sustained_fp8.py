"""What the sustained comparison makes of its measurements: a table with the plans that were faster, and no others."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.clocks import UNKNOWN
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.sustained_fp8 import Cell, with_faster_plans
from benchmarks.gpu.turns import Turns
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry

OLD = Fp8Plan(kind="hopper", block_m=128, block_n=128, num_stages=4)
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
