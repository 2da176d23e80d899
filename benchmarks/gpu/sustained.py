"""GEMM plans under sustained load, where the card's power decides: `python -m benchmarks.gpu.sustained`.

Each plan computes for a fraction of a second at a time, taking turns; turns of milliseconds (`tune`) run at clocks
that a long prefill never sees. Bits are compared first. Prints TFLOP/s and the ratio to the table's plan; `--out` gets
lines as `tables.make_table` reads them, the table's plan for its default cuBLAS. With `--fp8` the FP8 products of
`sustained_fp8.py`, within a minute, and a table of them at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import torch

from benchmarks.gpu import candidates
from benchmarks.gpu.gemm import LayerBench
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, Layer
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import LinearPlan

Plan = TypeVar("Plan", contravariant=True)
ALL_LAYERS = {layer.name: layer for layer in (*LAYERS, *FUSED_LAYERS)}
CALLS_AT_ONCE = 8  # between two looks at the clock


def plans_for(ops: CudaOps, layer: Layer, num_rows: int, most: int) -> list[LinearPlan]:
    """The table's plan first, then the library's and those of the kernels for many rows."""
    outputs = layer.out_features // 2 if layer.silu_mul else layer.out_features
    mine = ops.plans.linear(outputs, layer.in_features, num_rows, silu_mul=layer.silu_mul)
    offered = candidates.candidates(num_rows, silu_mul=layer.silu_mul)
    by_kind = sorted(offered, key=lambda plan: ("cublaslt", "hopper", "tma", "stream", "chain").index(plan.kind))
    return list(dict.fromkeys([mine, *by_kind]))[:most]


class Bench(Protocol[Plan]):
    """A layer with weights and rows."""

    out_features: int

    @property
    def weights(self) -> Sequence[object]: ...
    def run(self, plan: Plan, num_rows: int, index: int, out: torch.Tensor) -> None: ...
    def differing(self, plan: Plan, num_rows: int) -> int: ...


def turn_ms(bench: Bench[Plan], plan: Plan, num_rows: int, seconds: float) -> float:
    """Milliseconds of one product over at least that time, weights taking turns so that L2 stays cold."""
    out = torch.empty((num_rows, bench.out_features), device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(CALLS_AT_ONCE):
            bench.run(plan, num_rows, count % len(bench.weights), out)
            count += 1
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def sound_plans(bench: Bench[Plan], plans: list[Plan], num_rows: int) -> list[Plan]:
    found = []
    for plan in plans:
        try:
            differing = bench.differing(plan, num_rows)
        except RuntimeError as error:
            print(f"  does not run: {plan}: {str(error).splitlines()[-1][:120]}", flush=True)
            continue
        if differing:
            print(f"  {differing} bits differ: {plan}", flush=True)
        else:
            found.append(plan)
    return found


def measure(bench: Bench[Plan], plans: list[Plan], num_rows: int, seconds: float, rounds: int) -> list[list[float]]:
    """Milliseconds per plan and round; the first round warms up and is not told."""
    times: list[list[float]] = [[] for _ in plans]
    for index in range(rounds + 1):
        for plan, found in zip(plans, times, strict=True):
            milliseconds = turn_ms(bench, plan, num_rows, seconds)
            if index:
                found.append(milliseconds)
    return times


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
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; no cell is begun later")
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument(
        "--fp8", action="store_true", help="FP8 products; of the others --budget and --out, a directory then"
    )
    options = parser.parse_args()
    if options.fp8:
        from benchmarks.gpu import sustained_fp8

        sustained_fp8.run(min(options.budget, 60.0), options.out)
        return
    deadline_s = time.monotonic() + options.budget
    ops = CudaOps(torch.device("cuda"))
    for name in options.layers:
        layer = ALL_LAYERS[name]
        bench = LayerBench(ops, layer, max(options.rows))
        for num_rows in options.rows:
            if time.monotonic() > deadline_s:
                print(f"not begun: {name}, {num_rows} rows")
                continue
            plans = sound_plans(bench, plans_for(ops, layer, num_rows, options.most), num_rows)
            times = measure(bench, plans, num_rows, options.seconds, options.rounds)
            flops = 2.0 * num_rows * layer.out_features * layer.in_features
            for plan, found in sorted(zip(plans, times, strict=True), key=lambda pair: statistics.median(pair[1])):
                median = statistics.median(found)
                ratio = statistics.median(a / b for a, b in zip(found, times[0], strict=True))
                figures = f"{median * 1e3:8.1f} us {flops / median / 1e9:6.1f} TFLOP/s {ratio:.3f}"
                print(f"{name} {num_rows}: {figures} {plan}", flush=True)
                if options.out is not None:
                    line = {"layer": name, "num_rows": num_rows, "plan": msgspec.to_builtins(plan), "ms": found}
                    with options.out.open("a") as file:
                        file.write(json.dumps(line | {"base_ms": times[0]}) + "\n")


if __name__ == "__main__":
    main()
