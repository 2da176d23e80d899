"""Plans tuned for some row counts: what is compiled first, which plan is taken, and the table that is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import sweeps, tables
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.clocks import UNKNOWN, Sample
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS
from benchmarks.gpu.step_sizes import slower_than_larger
from benchmarks.gpu.sustained import taken_turns
from benchmarks.gpu.tune_rows import faster_plan
from benchmarks.gpu.tune_step import shorter_plan
from benchmarks.gpu.turns import Turn, Turns
from cluster.engine.kernels.triton.plans import LinearPlan
from cluster.engine.kernels.triton.table import (
    UNMEASURED,
    LinearEntry,
    PlanIndex,
    PlanTable,
    load_plan_index,
    unmeasured_plan,
)

OLD, NEW = LinearPlan(block_n=128), LinearPlan(block_n=32)
DEVICE = "NVIDIA H200"


def turns(*milliseconds: float) -> Turns:
    return Turns(list(milliseconds), [UNKNOWN] * len(milliseconds))


def test_a_plan_is_taken_that_is_more_than_a_hundredth_faster() -> None:
    assert faster_plan([OLD, NEW], [turns(1.0, 2.0, 1.0), turns(0.98, 1.96, 1.5)]) == NEW
    assert faster_plan([OLD, NEW], [turns(1.0, 1.0, 1.0), turns(0.995, 0.2, 1.1)]) is None
    assert faster_plan([OLD], [turns(1.0)]) is None


class FakeGraph:
    """Takes turns of set lengths, one after the other."""

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def take(self, seconds: float, sample: Callable[[], Sample]) -> Turn:
        return Turn(self.left.pop(0), UNKNOWN)


def test_plans_that_are_far_behind_when_they_warm_up_take_no_more_turns() -> None:
    graphs = [
        FakeGraph(1.5, 1.3, 1.4),
        FakeGraph(1.0, 1.1, 0.9),
        FakeGraph(1.45, 1.2, 1.2),
        FakeGraph(1.6),
        FakeGraph(9.0),
    ]
    found = taken_turns(graphs, 0.01, 2, within=1.2)
    assert [each.ms for each in found] == [[1.3, 1.4], [1.1, 0.9], [1.2, 1.2], [1.6, 1.6], [9.0, 9.0]]
    assert not any(graph.left for graph in graphs)
    everyone = [FakeGraph(1.0, 1.0), FakeGraph(9.0, 2.0)]
    assert [each.ms for each in taken_turns(everyone, 0.01, 1, within=math.inf)] == [[1.0], [2.0]]


def test_a_plan_is_taken_with_which_a_whole_step_is_shorter() -> None:
    assert shorter_plan([(1.0, OLD), (0.997, NEW), (1.01, LinearPlan())]) == NEW
    assert shorter_plan([(1.0, OLD), (0.9995, NEW)]) is None
    assert shorter_plan([(1.0, OLD)]) is None


def test_sizes_that_take_longer_than_a_larger_one_are_named() -> None:
    assert slower_than_larger((1, 2, 4, 8), (4.0, 4.4, 4.5, 4.3)) == [2, 4]
    assert slower_than_larger((1, 2), (4.0, 4.0)) == []
    assert slower_than_larger((1,), (4.0,)) == []


def shape_of(entry: LinearEntry) -> tuple[int, int, int, bool]:
    return entry.out_features, entry.in_features, entry.max_rows, entry.silu_mul


def test_the_rest_of_the_table_stays_as_it_is(tmp_path: Path) -> None:
    index = load_plan_index(DEVICE)
    plain, fused = LAYERS[0], FUSED_LAYERS[0]
    entries = tables.with_plans(index.entries(), {(plain, 32): NEW, (fused, 64): NEW, (plain, 33): NEW}, LinearEntry)
    path = tmp_path / "table.json"
    tables.write_table(PlanTable(device=DEVICE, linear=tuple(entries), attention=index.attention), path)
    written = msgspec.json.decode(path.read_bytes(), type=PlanTable)
    assert written.attention == index.attention
    plans = {shape_of(entry): entry for entry in written.linear}
    for shape in ((6144, 4096, 32, False), (14336, 4096, 64, True)):
        assert plans[shape].plan == NEW
    assert plans[6144, 4096, 33, False].plan == NEW
    others = [entry for entry in written.linear if entry.plan != NEW]
    assert others == [entry for entry in index.entries() if plans[shape_of(entry)].plan != NEW]
    assert len(others) == len(written.linear) - 3
    bounds = [entry.max_rows for entry in written.linear if shape_of(entry)[:2] == (6144, 4096)]
    assert bounds[5:8] == [32, 33, 64]
    assert bounds == sorted(bounds)


def test_a_device_without_a_table_gets_bounds_of_all_rows_first() -> None:
    """Or one measured row count would serve all others."""
    plain, fused = LAYERS[0], FUSED_LAYERS[0]
    entries = tables.with_weights([], [plain, fused], UNMEASURED, LinearEntry)
    with_one = tables.with_plans(entries, {(plain, 33): NEW}, LinearEntry)
    index = PlanIndex(PlanTable(device="none", linear=tuple(with_one)))
    assert index.linear(6144, 4096, 33, silu_mul=False) == NEW
    for num_rows in (1, 16, 64, 8192):
        assert index.linear(6144, 4096, num_rows, silu_mul=False) == unmeasured_plan(num_rows)
        assert index.linear(14336, 4096, num_rows, silu_mul=True) == unmeasured_plan(num_rows)
    assert tables.with_weights(entries, [plain], [(1, NEW)], LinearEntry) == entries


def test_only_the_wanted_candidates_are_compiled() -> None:
    assert {plan for _, plan in sweeps.compiled_plans((32, 64), ["plain"])} == {
        plan for rows in (32, 64) for plan in candidates(rows, silu_mul=False)
    }
    assert {silu for silu, _ in sweeps.compiled_plans((32,), ["silu_mul"])} == {True}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize(("rows", "epilogues"), [((32, 64), ["plain"]), ((8,), ["plain", "silu_mul"])])
def test_a_process_that_compiles_understands_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], epilogues: list[str], is_known: bool
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(sweeps, "compile_share", lambda *args, is_known: calls.append((*args, is_known)))
    words = sweeps.share_words(1, 5, rows, epilogues, is_known=is_known)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", *words])
    command.main()
    assert calls == [(1, 5, list(rows), epilogues, is_known)]


def test_known_plans_are_those_of_the_table_for_as_many_rows(tmp_path: Path) -> None:
    entries = load_plan_index(DEVICE).entries()
    offer = sweeps.known_candidates(DEVICE)
    for num_rows in (1, 32, 8192):
        for silu_mul in (False, True):
            found = set(offer(num_rows, silu_mul))
            of_rows = {each.plan for each in entries if each.max_rows == num_rows and each.silu_mul == silu_mul}
            assert of_rows <= found <= {*of_rows, LinearPlan(kind="cublaslt")}
    known = sweeps.compiled_plans((32, 64), ["plain"], offer)
    assert 1 < len(known) < len(sweeps.compiled_plans((32, 64), ["plain"]))


def test_a_table_is_made_again_for_another_device_or_other_versions(tmp_path: Path) -> None:
    path, versions = tmp_path / "table.json", {"triton": "3.6.0"}
    assert not tables.is_tuned(path, DEVICE, versions)
    path.write_text("{}")
    assert not tables.is_tuned(path, DEVICE, versions)
    entries = tuple(load_plan_index(DEVICE).entries())
    tables.write_table(PlanTable(device=DEVICE, versions=versions, linear=entries), path)
    assert tables.is_tuned(path, DEVICE, versions)
    assert not tables.is_tuned(path, "NVIDIA H20", versions)
    assert not tables.is_tuned(path, DEVICE, {"triton": "3.7.0"})
