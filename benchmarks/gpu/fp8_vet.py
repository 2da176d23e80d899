"""Tries every FP8 plan in processes that may hang or crash, before anything is measured.

A child runs its share of the plans and writes a line before and a line after each; one that hangs is killed
and named, one that takes the device's context with it is named, and the rest of the share goes to a new child.
What a child compiled lies in Triton's cache for the measurements.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import triton

from benchmarks.gpu.fp8_candidates import candidates
from benchmarks.gpu.fp8_layers import ROWS, HardOperands
from cluster.engine.kernels.cuda_fp8 import CudaFp8
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan

Job = tuple[bool, Fp8Plan]
CANNOT_RUN = (triton.TritonError, RuntimeError, ValueError, AssertionError)
_OUTPUTS, _INPUTS = 1024, 4096  # K as the layers have it, for the same specialisation of the kernels
_SILENCE_S = 12.0  # of a child at one plan, its two compilations included
_START_S = 25.0  # of a child before its first plan


class Verdict(msgspec.Struct, frozen=True):
    """What became of a plan: bits that differ from the reference's, or why it cannot run."""

    silu_mul: bool
    plan: Fp8Plan
    differing: int = 0
    error: str = ""


def all_jobs() -> list[Job]:
    """Every plan of every row count, each once, in a fixed order: those that could hang, for they wait on
    barriers of our own, come last."""
    jobs = {(silu, plan): None for rows in ROWS for silu in (False, True) for plan in candidates(rows, silu_mul=silu)}
    return sorted(jobs, key=lambda job: job[1].kind in ("rings", "stream"))


def vet_share(indices: list[int], report: Path) -> None:
    """The child: run these jobs one after the other, on inputs that reveal any other order of the sum."""
    fp8 = CudaFp8(torch.device("cuda"))
    jobs = all_jobs()
    cases = {silu: _cases(fp8, silu=silu) for silu in (False, True)}
    with report.open("a") as file:
        for index in indices:
            silu, plan = jobs[index]
            file.write(json.dumps({"start": index}) + "\n")
            file.flush()
            verdict = _try(cases[silu], silu, plan)
            file.write(json.dumps({"end": index, "verdict": msgspec.to_builtins(verdict)}) + "\n")
            file.flush()
            if verdict.error and not _device_answers():
                sys.exit("the plan took the device's context with it")


def _device_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Case(NamedTuple):
    hard: HardOperands
    expected: torch.Tensor


def _cases(fp8: CudaFp8, *, silu: bool) -> list[_Case]:
    """Order within a group shows in random numbers, the order of the groups in numbers made for it."""
    cases = []
    for reveals_order in (False, True):
        outputs = _OUTPUTS * (2 if silu else 1)
        hard = HardOperands(fp8, outputs, _INPUTS, 200, seed=0, reveals_order=reveals_order)
        cases.append(_Case(hard, hard.run(REFERENCE_FP8, 200, torch.float32, silu_mul=silu)))
    return cases


def _try(cases: list[_Case], silu: bool, plan: Fp8Plan) -> Verdict:
    differing = 0
    try:
        for hard, expected in cases:
            for rows in (1, 13, 200):
                for dtype in (torch.float32, torch.bfloat16):
                    found = hard.run(plan, rows, dtype, silu_mul=silu)
                    differing += int((found != expected[:rows].to(dtype)).sum())
        torch.cuda.synchronize()
    except CANNOT_RUN as error:
        return Verdict(silu, plan, error=" ".join(f"{type(error).__name__}: {error}".split())[:160])
    return Verdict(silu, plan, differing)


def child_command(indices: list[int], report: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "fp8-vet", *map(str, indices), "--out", str(report)]


def vet(processes: int, budget_s: float, is_wanted: Callable[[Job], bool] = lambda job: True) -> list[Verdict]:
    """The parent. Plans that nobody came to within the budget are missing from the result."""
    jobs = all_jobs()
    deadline = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory() as directory:
        indices = [index for index, job in enumerate(jobs) if is_wanted(job)]
        parts = [indices[start::processes] for start in range(processes)]
        shares = [_Share(part, Path(directory) / f"{part[0]}.jsonl") for part in parts if part]
        while any(share.is_running() for share in shares) and time.monotonic() < deadline:
            time.sleep(0.1)
            for share in shares:
                share.tend()
        for share in shares:
            share.stop()
        return [verdict for share in shares for verdict in share.verdicts(jobs)]


class _Share:
    """Some jobs and the child that does them."""

    def __init__(self, indices: list[int], report: Path) -> None:
        self._todo = indices
        self._report = report
        self._words = report.with_suffix(".txt")  # the child's stderr: a pipe nobody reads would stop it
        self._failed: dict[int, str] = {}
        report.touch()
        self._start()

    def _start(self) -> None:
        with self._words.open("w") as words:
            self._process = subprocess.Popen(child_command(self._todo, self._report), stderr=words)
        self._num_todo_at_start = len(self._todo)
        self._started_s = time.time()

    def is_running(self) -> bool:
        return self._process.poll() is None or bool(self._todo)

    def tend(self) -> None:
        """Drop what is done; replace a child that died or has been silent for too long."""
        has_died = self._process.poll() is not None  # asked first: the lines are then all that it has written
        lines = self._lines()
        ended = {line["end"] for line in lines if "end" in line}
        self._todo = [index for index in self._todo if index not in ended and index not in self._failed]
        last_line_s = self._report.stat().st_mtime
        has_begun = last_line_s > self._started_s
        is_silent = time.time() > (last_line_s + _SILENCE_S if has_begun else self._started_s + _START_S)
        if not self._todo or not (has_died or is_silent):
            return
        self.stop()
        begun = [line["start"] for line in lines if "start" in line and line["start"] in self._todo]
        if not begun and len(self._todo) == self._num_todo_at_start:
            begun = self._todo  # it cannot even start
        reason = "it does not end"
        if has_died:
            reason = f"the process died: {' '.join(self._words.read_text().splitlines()[-1:])[:200]}"
        self._failed |= dict.fromkeys(begun, reason)
        self._todo = [index for index in self._todo if index not in self._failed]
        if self._todo:
            self._start()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(timeout=30)

    def _lines(self) -> list[dict[str, object]]:
        """Without a last one that is being written."""
        return [json.loads(line) for line in self._report.read_text().splitlines() if line.endswith("}")]

    def verdicts(self, jobs: list[Job]) -> list[Verdict]:
        found = [msgspec.convert(line["verdict"], Verdict) for line in self._lines() if "end" in line]
        return found + [Verdict(*jobs[index], error=reason) for index, reason in self._failed.items()]
