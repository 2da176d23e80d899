"""GEMM plans of some layers and row counts against the table's: `python -m benchmarks.gpu.tune_rows --out FILE`.

All candidates are compiled by parallel processes first. Then they take short turns of graphs, bits compared before.
Prints the ten fastest of each cell with the ratio to the table's plan; FILE gets the device's table with the plans
that take at least 1 % less time. A FILE of this device and these versions is left as it is: `--again` tunes again.

`--known` tries only what the table has for some weight and as many rows: a whole model on a new device in a minute.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import sustained, sweeps, tables
from benchmarks.gpu.gemm import LayerBench
from benchmarks.gpu.shapes import ROW_COUNTS, Layer
from benchmarks.gpu.turns import Turns
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import LinearPlan
from cluster.engine.kernels.triton.table import UNMEASURED, LinearEntry, PlanIndex, PlanTable, library_versions

_MODEL_LAYERS = ("8b.qkv", "8b.o", "8b.gate_up_silu", "8b.down", "8b.lm_head")
_TURN_S = 0.01
_ROUNDS = 6
_WITHIN = 1.2  # of the fastest's time in the round that warms up, or no more turns
_PRINTED = 10
_FASTER = 0.99  # of the table's time: less could be chance


def faster_plan(plans: Sequence[LinearPlan], turns: Sequence[Turns]) -> LinearPlan | None:
    """The fastest, unless the table's, which comes first, is about as fast."""
    ratios = [found.ratio(turns[0]) for found in turns]
    best = min(range(len(plans)), key=lambda index: ratios[index])
    return plans[best] if ratios[best] < _FASTER else None


def tune_layer(
    ops: CudaOps, layer: Layer, row_counts: Sequence[int], deadline_s: float, offer: sweeps.Offer
) -> dict[int, LinearPlan]:
    """By row count, where a plan is faster than the table's."""
    found: dict[int, LinearPlan] = {}
    bench = LayerBench(ops, layer, max(row_counts))
    for num_rows in row_counts:
        if time.monotonic() > deadline_s:
            print(f"not begun: {layer.name}, {num_rows} rows")
            continue
        offered = sustained.plans_for(ops, layer, num_rows, offer=offer)
        plans = sustained.sound_plans(bench, offered, num_rows)
        if plans[:1] != offered[:1]:
            print(f"left out: {layer.name}, {num_rows} rows: the table's plan is not sound")
            continue
        turns = sustained.measure(bench, plans, num_rows, _TURN_S, _ROUNDS, within=_WITHIN)
        sustained.print_cell(layer, num_rows, plans, turns, _PRINTED)
        plan = faster_plan(plans, turns)
        if plan is not None:
            found[num_rows] = plan
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune_rows", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=_MODEL_LAYERS, choices=list(sustained.ALL_LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROW_COUNTS)
    parser.add_argument("--known", action="store_true", help="only plans that the table has somewhere")
    parser.add_argument("--again", action="store_true", help="even if the file is of this device and these versions")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after compiling; no cell is begun later")
    parser.add_argument("--out", type=Path, required=True, help="a file for the table")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    if not options.again and tables.is_tuned(options.out, device, library_versions()):
        print(f"{options.out} is of {device} and these versions already")
        return
    layers = [sustained.ALL_LAYERS[name] for name in options.layers]
    start_s = time.monotonic()
    fused = {layer.silu_mul for layer in layers}
    epilogues = [name for name, silu_mul in sweeps.EPILOGUES.items() if silu_mul in fused]
    shares = max(1, (os.cpu_count() or 1) // 2)
    sweeps.compile_all(shares, options.rows, epilogues, is_known=options.known)
    print(f"compiled in {time.monotonic() - start_s:.0f} s", flush=True)
    deadline_s = time.monotonic() + options.budget
    offer = sweeps.known_candidates(device) if options.known else sweeps.all_candidates
    ops = CudaOps(torch.device("cuda"))
    entries = tables.with_weights(ops.plans.entries(), layers, UNMEASURED, LinearEntry)
    ops.plans = PlanIndex(PlanTable(device=device, linear=tuple(entries), attention=ops.plans.attention))
    faster: dict[tuple[Layer, int], LinearPlan] = {}
    for layer in layers:
        found = tune_layer(ops, layer, options.rows, deadline_s, offer)
        faster |= {(layer, num_rows): plan for num_rows, plan in found.items()}
        torch.cuda.empty_cache()
    table = PlanTable(
        device=device, versions=library_versions(), attention=ops.plans.attention,
        linear=tuple(tables.with_plans(entries, faster, LinearEntry)),
    )  # fmt: skip
    tables.write_table(table, options.out)
    print(f"{len(faster)} faster plans, {options.out}; {time.monotonic() - start_s:.0f} s")


if __name__ == "__main__":
    main()
