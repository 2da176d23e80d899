"""GEMM plans chosen by what the whole decode step takes: `python -m benchmarks.gpu.tune_step --rows 32 --out FILE`.

A product that is the fastest by itself need not be so between its neighbours, whose launches and loads overlap with its
own. So each candidate is put into a graph of a whole step of the 8B shape, and the graphs take turns. One layer after
the other, each with what was found before; all candidates are compiled by parallel processes first. FILE gets the
device's table with the plans that take at least 0.1 % off the step; row counts that it has not become bounds of their
own, which serve fewer rows, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.gpu import sustained, sweeps, tables
from benchmarks.gpu.gemm import LayerBench
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.step import DecodeStep, decode_batch
from benchmarks.gpu.timing import interleaved_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import LinearKind, LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex, PlanTable, library_versions

LAYERS = ("8b.gate_up_silu", "8b.down", "8b.qkv", "8b.o", "8b.lm_head")
CONTEXT = 256  # tokens of a sequence: one split, as in an engine's graphs for short contexts
_FASTER = 0.999  # of the step's time: turns repeat to a few parts in ten thousand
_PRINTED = 4
_CONFIRMED = 2  # take turns again
_MOST_ROWS = 512  # sequences
_TOGETHER = 12  # graphs that take turns
_TURN_MS, _ROUNDS = 6.0, 20  # a turn is a step or two


def shorter_plan(found: Sequence[tuple[float, LinearPlan]]) -> LinearPlan | None:
    """Of (step's time beside the table's plan's, plan): the one of the shortest step, unless it is about as long."""
    ratio, plan = min(found, key=lambda pair: pair[0])
    return plan if ratio < _FASTER else None


class StepTuner:
    """Owns the weights of a step and the plans found so far. `kinds`: of the plans tried besides the table's."""

    def __init__(self, kinds: Collection[str] | None = None) -> None:
        self._kinds = kinds
        self.ops = CudaOps(torch.device("cuda"), residual_dtype=torch.bfloat16, pdl=True)
        self.entries: Sequence[LinearEntry] = self.ops.plans.entries()
        self._step = DecodeStep(self.ops)

    def table(self) -> PlanTable:
        return self._table(self.entries)

    def _table(self, entries: Sequence[LinearEntry]) -> PlanTable:
        return PlanTable(
            device=torch.cuda.get_device_name(), versions=library_versions(), attention=self.ops.plans.attention,
            linear=tuple(entries),
        )  # fmt: skip

    def tune(self, layer: Layer, num_rows: int) -> None:
        """Keep the plan of this layer that makes the step shortest, if it does so again."""
        plans = self._sound_plans(layer, num_rows)
        token_ids, kv, metadata = decode_batch(num_rows, CONTEXT)

        def step_with(plan: LinearPlan) -> Callable[[], object]:
            def run() -> object:
                self._serve(layer, num_rows, plan)
                return self._step.run(token_ids, kv, metadata)

            return run

        def ratios(some: Sequence[LinearPlan]) -> list[tuple[float, LinearPlan]]:
            times = interleaved_ms([[step_with(plan)] for plan in some], rounds=_ROUNDS, min_ms=_TURN_MS)
            milliseconds = [statistics.fmean(each) for each in times]  # clocks swing: a median would pick one of them
            return [(each / milliseconds[0], plan) for each, plan in zip(milliseconds, some, strict=True)]

        found: list[tuple[float, LinearPlan]] = []
        for first in range(1, len(plans), _TOGETHER):
            found += ratios([plans[0], *plans[first : first + _TOGETHER]])
        found.sort(key=lambda pair: pair[0])
        for ratio, plan in found[:_PRINTED]:
            print(f"{layer.name:16} {num_rows:3} rows  {ratio:.4f}  {plan}", flush=True)
        # The best of many is the luckiest, too.
        best = shorter_plan(ratios([plans[0], *(plan for _, plan in found[:_CONFIRMED] if plan != plans[0])]))
        if best is not None:
            self.entries = tables.with_plans(self.entries, {(layer, num_rows): best})
        self._serve(layer, num_rows, best or plans[0])

    def _sound_plans(self, layer: Layer, num_rows: int) -> list[LinearPlan]:
        """The table's first. Where it is not sound, another plan served: there is nothing to compare with."""
        bench = LayerBench(self.ops, layer, num_rows)
        mine, *others = sustained.plans_for(self.ops, layer, num_rows)
        offered = [mine, *(plan for plan in others if self._kinds is None or plan.kind in self._kinds)]
        plans = sustained.sound_plans(bench, offered, num_rows)
        if plans[:1] != offered[:1]:
            raise RuntimeError(f"{layer.name}, {num_rows} rows: the table's plan is not sound; tune_rows finds another")
        return plans

    def _serve(self, layer: Layer, num_rows: int, plan: LinearPlan) -> None:
        self.ops.plans = PlanIndex(self._table(tables.with_plans(self.entries, {(layer, num_rows): plan})))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--rows", nargs="+", type=int, default=[32])
    parser.add_argument("--kinds", nargs="+", choices=get_args(LinearKind), help="only such plans")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after compiling; no layer is begun later")
    parser.add_argument("--out", type=Path, required=True, help="a file for the table")
    options = parser.parse_args()
    if not all(1 <= rows <= _MOST_ROWS for rows in options.rows):
        parser.error(f"--rows: a step has 1 to {_MOST_ROWS} sequences")
    start_s = time.monotonic()
    sweeps.compile_all(max(1, (os.cpu_count() or 1) // 2), options.rows)
    print(f"compiled in {time.monotonic() - start_s:.0f} s", flush=True)
    deadline_s = time.monotonic() + options.budget
    tuner = StepTuner(options.kinds)
    for num_rows in options.rows:
        for name in options.layers:
            if time.monotonic() > deadline_s:
                print(f"not begun: {name}, {num_rows} rows", flush=True)
                continue
            tuner.tune(sustained.ALL_LAYERS[name], num_rows)
            tables.write_table(tuner.table(), options.out)
    for refusal in tuner.ops.admission.refusals:  # another plan took the time that is told of this one
        print("refused:", refusal)


if __name__ == "__main__":
    main()
