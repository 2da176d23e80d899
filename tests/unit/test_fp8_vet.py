"""Trying FP8 plans in processes that may die or hang: the bad plan is named, the others get their turn."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("triton")

from benchmarks.gpu import fp8_vet
from benchmarks.gpu.fp8_candidates import candidates
from benchmarks.gpu.fp8_layers import ROWS

CHILD = """
import json, os, sys, time
report, verdicts, indices = sys.argv[1], json.loads(sys.argv[2]), map(int, sys.argv[3:])
with open(report, "a") as file:
    for index in indices:
        print(json.dumps({"start": index}), file=file, flush=True)
        if index == 2:
            sys.exit("a plan that kills its process")
        if index == 5:
            time.sleep(60)
        print(json.dumps({"end": index, "verdict": verdicts[index]}), file=file, flush=True)
        if index == 6:
            sys.exit("the plan took the device's context with it")
"""


def test_a_plan_that_kills_or_hangs_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = fp8_vet.all_jobs()[:8]
    verdicts = msgspec.json.encode([fp8_vet.Verdict(*job, differing=index) for index, job in enumerate(jobs)]).decode()

    def child_command(indices: list[int], report: Path) -> list[str]:
        return [sys.executable, "-c", CHILD, str(report), verdicts, *map(str, indices)]

    monkeypatch.setattr(fp8_vet, "all_jobs", lambda: jobs)
    monkeypatch.setattr(fp8_vet, "child_command", child_command)
    monkeypatch.setattr(fp8_vet, "_SILENCE_S", 5.0)
    found = {jobs.index((v.silu_mul, v.plan)): v for v in fp8_vet.vet(processes=2, budget_s=60)}
    assert sorted(found) == list(range(8))
    assert "a plan that kills its process" in found[2].error
    assert found[5].error == "it does not end"
    assert {index: v.differing for index, v in found.items() if not v.error} == {i: i for i in (0, 1, 3, 4, 6, 7)}


def test_a_child_that_cannot_start_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = fp8_vet.all_jobs()[:3]
    monkeypatch.setattr(fp8_vet, "all_jobs", lambda: jobs)
    monkeypatch.setattr(
        fp8_vet, "child_command", lambda indices, report: [sys.executable, "-c", "raise SystemExit('no')"]
    )
    assert {verdict.error for verdict in fp8_vet.vet(processes=1, budget_s=60)} == {"the process died: no"}


def test_every_row_count_has_candidates_of_every_suitable_kind() -> None:
    for rows in ROWS:
        for silu in (False, True):
            kinds = {plan.kind for plan in candidates(rows, silu_mul=silu)}
            assert kinds >= ({"stream", "chain"} if rows < 64 else {"tma"}), (rows, silu)
            assert ("rings" in kinds) == (rows > 64)
    assert len(fp8_vet.all_jobs()) == len(set(fp8_vet.all_jobs()))
