"""Plans of products by what a whole decode step takes: `python -m benchmarks.gpu.tune_step --rows 32 --out FILE`.

A product that is the fastest by itself need not be so between its neighbours, whose launches and loads overlap with its
own. So each candidate is put into a graph of a whole step of the 8B shape, and the graphs take turns. One layer after
the other, each with what was found before; all candidates are compiled by parallel processes first. FILE gets the
device's table with the plans that take at least 0.1 % off the step; row counts that it has not become bounds of their
own, which serve fewer rows, too. `--fp8`: of the FP8 products, into a table of theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Generic

import torch

from benchmarks.gpu.step import DecodeStep, decode_batch
from benchmarks.gpu.step_plans import BF16_LAYERS, Bf16Plans, Fp8Plans, Plan, StepPlans
from benchmarks.gpu.timing import interleaved_ms
from cluster.engine.kernels.cuda_ops import CudaOps

CONTEXT = 256  # tokens of a sequence: one split, as in an engine's graphs for short contexts
_FASTER = 0.999  # of the step's time: turns repeat to a few parts in ten thousand
_PRINTED = 4
_CONFIRMED = 2  # take turns again
_MOST_ROWS = 512  # sequences
_TOGETHER = 12  # graphs that take turns
_TURN_MS, _ROUNDS = 6.0, 20  # a turn is a step or two


def shorter_plan(found: Sequence[tuple[float, Plan]]) -> Plan | None:
    """Of (step's time beside the table's plan's, plan): the one of the shortest step, unless it is about as long."""
    ratio, plan = min(found, key=lambda pair: pair[0])
    return plan if ratio < _FASTER else None


class StepTuner(Generic[Plan]):
    """Owns the weights of a step. `kinds`: of the plans tried besides the table's."""

    def __init__(self, plans: StepPlans[Plan], step: DecodeStep, kinds: Collection[str]) -> None:
        self._plans, self._step, self._kinds = plans, step, kinds

    def tune(self, layer: str, num_rows: int) -> None:
        """Keep the plan of this layer that makes the step shortest, if it does so again."""
        plans = self._plans.offered(layer, num_rows, self._kinds)
        token_ids, kv, metadata = decode_batch(num_rows, CONTEXT)

        def step_with(plan: Plan) -> Callable[[], object]:
            def run() -> object:
                self._plans.serve(layer, num_rows, plan)
                return self._step.run(token_ids, kv, metadata)

            return run

        def ratios(some: Sequence[Plan]) -> list[tuple[float, Plan]]:
            times = interleaved_ms([[step_with(plan)] for plan in some], rounds=_ROUNDS, min_ms=_TURN_MS)
            milliseconds = [statistics.fmean(each) for each in times]  # clocks swing: a median would pick one of them
            return [(each / milliseconds[0], plan) for each, plan in zip(milliseconds, some, strict=True)]

        found: list[tuple[float, Plan]] = []
        for first in range(1, len(plans), _TOGETHER):
            found += ratios([plans[0], *plans[first : first + _TOGETHER]])
        found.sort(key=lambda pair: pair[0])
        for ratio, plan in found[:_PRINTED]:
            print(f"{layer:16} {num_rows:3} rows  {ratio:.4f}  {plan}", flush=True)
        # The best of many is the luckiest, too.
        best = shorter_plan(ratios([plans[0], *(plan for _, plan in found[:_CONFIRMED] if plan != plans[0])]))
        if best is not None:
            self._plans.keep(layer, num_rows, best)
        self._plans.serve(layer, num_rows, best or plans[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="FP8 products, per-channel scales")
    parser.add_argument("--layers", nargs="+", choices=BF16_LAYERS, help="all; lm_head has no FP8 plans")
    parser.add_argument("--rows", nargs="+", type=int, default=[32])
    parser.add_argument("--kinds", nargs="+", help="only plans of these kernels")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after compiling; no layer is begun later")
    parser.add_argument("--out", type=Path, required=True, help="a file for the table")
    options = parser.parse_args()
    chosen = Fp8Plans if options.fp8 else Bf16Plans
    if not all(1 <= rows <= _MOST_ROWS for rows in options.rows):
        parser.error(f"--rows: a step has 1 to {_MOST_ROWS} sequences")
    for name, given, known in (("kinds", options.kinds, chosen.kinds), ("layers", options.layers, chosen.layers)):
        if unknown := sorted(set(given or ()) - set(known)):
            parser.error(f"--{name}: no {', '.join(unknown)} here; there are {', '.join(known)}")
    kinds = options.kinds or chosen.kinds
    ops = CudaOps(torch.device("cuda"), residual_dtype=torch.bfloat16, pdl=True)
    plans: StepPlans[Any] = chosen(ops)
    start_s = time.monotonic()
    plans.prepare(options.rows, kinds)
    print(f"compiled in {time.monotonic() - start_s:.0f} s", flush=True)
    deadline_s = time.monotonic() + options.budget
    tuner = StepTuner(plans, DecodeStep(ops, has_fp8=options.fp8), kinds)
    for num_rows in options.rows:
        for layer in options.layers or chosen.layers:
            if time.monotonic() > deadline_s:
                print(f"not begun: {layer}, {num_rows} rows", flush=True)
                continue
            tuner.tune(layer, num_rows)
            plans.write(options.out)
    for refusal in ops.admission.refusals:  # another plan took the time that is told of this one
        print("refused:", refusal)


if __name__ == "__main__":
    main()
