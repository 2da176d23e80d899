"""GEMM plans under sustained load, where the card's power decides: `python -m benchmarks.gpu.sustained`.

Each plan computes for a fraction of a second at a time, taking turns; turns of milliseconds (`tune`) run at clocks
that a long prefill never sees. Bits are compared first. Prints TFLOP/s, the ratio to the table's plan, clock and power
near the end of the turns, and the share of the tensor cores' peak at that clock; `--out` gets lines as
`tables.make_table` reads them, the table's plan for its default cuBLAS. With `--fp8` the FP8 products of
`sustained_fp8.py`, and a table of them at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import torch
import triton

from benchmarks.gpu.clocks import BF16_FLOP_PER_CLOCK, Sample, sampler
from benchmarks.gpu.gemm import LayerBench
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, Layer
from benchmarks.gpu.sweeps import Offer, all_candidates
from benchmarks.gpu.timing import shuffled_rounds
from benchmarks.gpu.turns import GraphTurns, Turn, Turns
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import LinearPlan

Plan = TypeVar("Plan", contravariant=True)
ALL_LAYERS = {layer.name: layer for layer in (*LAYERS, *FUSED_LAYERS)}
LEAST_CALLS = 8  # of a graph
FP8_BUDGET_S, MOST_FP8_BUDGET_S = 60.0, 200.0


def plans_for(
    ops: CudaOps, layer: Layer, num_rows: int, most: int | None = None, offer: Offer = all_candidates
) -> list[LinearPlan]:
    """The table's plan first, then the library's and those of the kernels for many rows."""
    mine = ops.plans.linear(layer.outputs, layer.in_features, num_rows, silu_mul=layer.silu_mul)
    offered = offer(num_rows, layer.silu_mul)
    by_kind = sorted(offered, key=lambda plan: ("cublaslt", "hopper", "tma", "stream", "chain").index(plan.kind))
    return list(dict.fromkeys([mine, *by_kind]))[:most]


class Bench(Protocol[Plan]):
    """A layer with weights and rows."""

    out_features: int

    @property
    def weights(self) -> Sequence[object]: ...
    def run(self, plan: Plan, num_rows: int, index: int, out: torch.Tensor) -> None: ...
    def differing(self, plan: Plan, num_rows: int) -> int: ...


class TakesTurns(Protocol):
    def take(self, seconds: float, sample: Callable[[], Sample]) -> Turn: ...


def rotation(num_weights: int) -> list[int]:
    """Which weights the calls of a graph read: all equally often, so that L2 stays cold."""
    return list(range(num_weights)) * -(-LEAST_CALLS // num_weights)


def sound_plans(bench: Bench[Plan], plans: list[Plan], num_rows: int) -> list[Plan]:
    found = []
    for plan in plans:
        try:
            differing = bench.differing(plan, num_rows)
        except (triton.TritonError, RuntimeError) as error:
            print(f"  does not run: {plan}: {' '.join(str(error).split())[-120:]}", flush=True)
            continue
        if differing:
            print(f"  {differing} bits differ: {plan}", flush=True)
        else:
            found.append(plan)
    return found


def measure(
    bench: Bench[Plan], plans: list[Plan], num_rows: int, seconds: float, rounds: int, *, within: float = math.inf
) -> list[Turns]:
    """What each plan's turns found; the first round warms up and is not told.

    A plan but the first that takes more than `within` times as long as the fastest there takes no more turns: that
    one stands for all of them.
    """
    out = torch.empty((num_rows, bench.out_features), device="cuda", dtype=torch.bfloat16)
    indices = rotation(len(bench.weights))
    graphs = [GraphTurns([partial(bench.run, plan, num_rows, index, out) for index in indices]) for plan in plans]
    found = taken_turns(graphs, seconds, rounds, within)
    graphs.clear()
    torch.cuda.empty_cache()  # their memory pools
    return found


def taken_turns(graphs: Sequence[TakesTurns], seconds: float, rounds: int, within: float) -> list[Turns]:
    """As `measure` describes it."""
    sample = sampler()
    warm = [graph.take(seconds, sample) for graph in graphs]
    bound_ms = max(within * min(turn.ms for turn in warm), warm[0].ms)
    taken: list[list[Turn]] = [[] if turn.ms <= bound_ms else [turn] * rounds for turn in warm]
    going_on = [index for index, turns in enumerate(taken) if not turns]
    for order in shuffled_rounds(len(going_on), rounds):
        for place in order:
            taken[going_on[place]].append(graphs[going_on[place]].take(seconds, sample))
    return [Turns.of(turns) for turns in taken]


def print_cell(
    layer: Layer, num_rows: int, plans: list[LinearPlan], turns: list[Turns], most: int | None = None
) -> None:  # fmt: skip
    """The fastest first, with its ratio to the first plan."""
    flop = 2.0 * num_rows * layer.out_features * layer.in_features
    ranked = sorted(zip(plans, turns, strict=True), key=lambda pair: pair[1].median_ms)
    for plan, found in ranked[:most]:
        milliseconds, load = found.median_ms, found.load(flop, BF16_FLOP_PER_CLOCK)
        speed = f"{milliseconds * 1e3:8.1f} us {flop / milliseconds / 1e9:6.1f} TFLOP/s {found.ratio(turns[0]):.3f}"
        print(f"{layer.name} {num_rows}: {speed} {load} {plan}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.sustained", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--layers", nargs="*", default=["8b.gate_up_silu"], choices=list(ALL_LAYERS))
    parser.add_argument("--rows", nargs="*", type=int, default=[256, 512, 1024, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=0.25, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=10, help="plans of a cell")
    parser.add_argument("--budget", type=float, help="seconds; no cell is begun later (120; --fp8: 60, at most 200)")
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument(
        "--fp8", action="store_true", help="FP8 products; of the others --budget and --out, a directory then"
    )
    options = parser.parse_args()
    if options.fp8:
        from benchmarks.gpu import sustained_fp8

        sustained_fp8.run(min(options.budget or FP8_BUDGET_S, MOST_FP8_BUDGET_S), options.out)
        return
    deadline_s = time.monotonic() + (options.budget or 120.0)
    ops = CudaOps(torch.device("cuda"))
    for name in options.layers:
        layer = ALL_LAYERS[name]
        bench = LayerBench(ops, layer, max(options.rows))
        for num_rows in options.rows:
            if time.monotonic() > deadline_s:
                print(f"not begun: {name}, {num_rows} rows")
                continue
            plans = sound_plans(bench, plans_for(ops, layer, num_rows, options.most), num_rows)
            turns = measure(bench, plans, num_rows, options.seconds, options.rounds)
            print_cell(layer, num_rows, plans, turns)
            if options.out is not None:
                with options.out.open("a") as file:
                    for plan, found in zip(plans, turns, strict=True):
                        line = {"layer": name, "num_rows": num_rows, "plan": msgspec.to_builtins(plan), "ms": found.ms}
                        file.write(json.dumps(line | {"base_ms": turns[0].ms}) + "\n")


if __name__ == "__main__":
    main()
