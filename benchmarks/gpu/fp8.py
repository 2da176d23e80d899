"""`python -m benchmarks.gpu fp8`: which FP8 plans keep the bits, which is fastest, and how that compares.

Three stages, each within its share of the budget: all plans are tried in processes of their own
(`fp8_vet.py`); the sound ones are timed per layer and row count, beside torch._scaled_mm and our own bf16; the
questions that decide the canonical order are asked. Prints a compact table last; writes
`fp8-measurements.jsonl` and the device's plan table to --out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu import fp8_questions, fp8_vet
from benchmarks.gpu.fp8_candidates import candidates
from benchmarks.gpu.fp8_layers import LAYERS, ROWS, random_weights
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.timing import graph_ms
from cluster.engine.kernels import fp8 as numbers
from cluster.engine.kernels.cuda_fp8 import library_linear
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import Scaling
from cluster.engine.kernels.triton import fp8_launch
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan, unmeasured_plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8Table
from cluster.engine.kernels.triton.table import file_stem, library_versions

_COLD_BYTES = 200 << 20  # rotate over this much weight, several times the L2
_LIBRARY = Fp8Plan(kind="library")
_SEPARATE = Fp8Plan(kind="separate")


class Cell(NamedTuple):
    """One layer at one row count. Milliseconds; NaN: cannot run."""

    layer: Layer
    num_rows: int
    plan: Fp8Plan
    own_plan: Fp8Plan  # the fastest that is no library's
    ours: float
    fast: float  # torch._scaled_mm, sums left in the tensor core
    slow: float  # the same with use_fast_accum=False
    bf16: float  # our own
    library_differs: int  # values in which `slow` differs from ours; -1: cannot run


class LayerBench:
    """Weights, rows and timings of one layer. For SwiGLU the down projection's input is quantised, too."""

    def __init__(self, ops: CudaOps, layer: Layer) -> None:
        self.ops, self.layer = ops, layer
        self.weights = random_weights(ops.fp8, layer, _COLD_BYTES)
        self.x = torch.randn((max(ROWS), layer.in_features), device="cuda", dtype=torch.bfloat16)
        self.rows = ops.fp8.quantized(self.x, self.weights[0])
        self.outputs = layer.outputs

    def ours_ms(self, plan: Fp8Plan, num_rows: int, *, promote: bool = True) -> float:
        rows, silu = self.rows[:num_rows], self.layer.silu_mul
        outs = [torch.empty((num_rows, self.outputs), device="cuda", dtype=torch.bfloat16) for _ in self.weights]

        def call(index: int) -> None:
            self.ops.fp8.run_linear(
                rows, self.weights[index], None, outs[index], plan, silu_mul=silu, promote=promote
            )  # fmt: skip
            if silu:
                fp8_launch.quantize(outs[index], Scaling.CHANNEL)

        return _time(call, len(self.weights))

    def separate_ms(self, plan: Fp8Plan, num_rows: int) -> float:
        """SwiGLU as a plain product by `plan` and one kernel after it."""
        rows, weights = self.rows[:num_rows], self.weights
        outs = [torch.empty((num_rows, 2 * self.outputs), device="cuda", dtype=torch.bfloat16) for _ in weights]

        def call(index: int) -> None:
            self.ops.fp8.run_linear(rows, weights[index], None, outs[index], plan, silu_mul=False)
            fp8_launch.silu_mul_quantize(outs[index], Scaling.CHANNEL)

        return _time(call, len(weights))

    def library_ms(self, num_rows: int, *, fast: bool) -> float:
        """torch._scaled_mm, and for SwiGLU the kernel after it."""
        values, scales = numbers.split_rows(self.rows[:num_rows], self.layer.in_features, Scaling.CHANNEL)
        wide = self.layer.out_features
        outs = [torch.empty((num_rows, wide), device="cuda", dtype=torch.bfloat16) for _ in self.weights]

        def call(index: int) -> None:
            library_linear(values, scales, self.weights[index], outs[index], use_fast_accum=fast)
            if self.layer.silu_mul:
                fp8_launch.silu_mul_quantize(outs[index], Scaling.CHANNEL)

        return _time(call, len(self.weights))

    def library_differs(self, num_rows: int, lowest: int) -> int:
        """Values that differ from ours, also for row counts between the last bound and this one: the library may
        choose by them. -1: cannot run."""
        found = 0
        for rows in sorted({lowest, (lowest + num_rows) // 2, num_rows}):
            ours, theirs = (torch.empty((rows, self.outputs), device="cuda", dtype=torch.bfloat16) for _ in range(2))
            values, scales = numbers.split_rows(self.rows[:rows], self.layer.in_features, Scaling.CHANNEL)
            try:
                library_linear(values, scales, self.weights[0], theirs)
            except RuntimeError:
                return -1
            self.ops.fp8.run_linear(self.rows[:rows], self.weights[0], None, ours, REFERENCE_FP8, silu_mul=False)
            found += int((ours != theirs).sum())
        return found


def _time(call: Callable[[int], object], copies: int) -> float:
    """NaN if it cannot run."""
    try:
        return graph_ms([partial(call, index) for index in range(copies)], min_ms=1.0, replays=3)
    except fp8_vet.CANNOT_RUN:
        return math.nan


def measure_layer(
    ops: CudaOps, layer: Layer, sound: set[fp8_vet.Job], plain: dict[int, Fp8Plan], deadline_s: float
) -> list[Cell]:
    """`plain`: the best plan by row count of the same weight without SwiGLU."""
    bench = LayerBench(ops, layer)
    cells = []
    lowest = 1
    for num_rows in ROWS:
        if time.monotonic() > deadline_s:
            print(f"{layer.name}: no time left from {num_rows} rows on")
            break
        plans = [p for p in candidates(num_rows, silu_mul=layer.silu_mul) if (layer.silu_mul, p) in sound]
        timed = {plan: bench.ours_ms(plan, num_rows) for plan in plans}
        slow, fast = (bench.library_ms(num_rows, fast=fast) for fast in (False, True))
        differs = -1 if layer.silu_mul else bench.library_differs(num_rows, lowest)
        if differs == 0:
            timed[_LIBRARY] = slow
        if layer.silu_mul:
            timed[_SEPARATE] = bench.separate_ms(plain.get(num_rows, unmeasured_plan(num_rows)), num_rows)
        ranked = sorted((ms, index, plan) for index, (plan, ms) in enumerate(timed.items()) if not math.isnan(ms))
        best_ms, _, best = ranked[0] if ranked else (math.nan, 0, unmeasured_plan(num_rows))
        own = next((plan for _, _, plan in ranked if plan.kind != "library"), unmeasured_plan(num_rows))
        cells.append(Cell(layer, num_rows, best, own, best_ms, fast, slow, math.nan, differs))
        print(layer.name, num_rows, " ".join(f"{short(plan)}={ms * 1e3:.1f}us" for ms, _, plan in ranked[:6]))
        lowest = num_rows + 1
    del bench
    torch.cuda.empty_cache()
    return cells


def with_bf16(ops: CudaOps, cells: list[Cell], deadline_s: float) -> list[Cell]:
    """Our bf16 beside each cell, as far as the time goes: its kernels may have to be compiled first."""
    found: dict[tuple[str, int], float] = {}
    for layer in LAYERS:
        weight_NK = torch.randn((layer.out_features, layer.in_features), device="cuda", dtype=torch.bfloat16)
        copies = max(1, min(6, -(-_COLD_BYTES // weight_NK.nbytes)))
        weights = [ops.pack_linear(weight_NK.clone()) for _ in range(copies)]
        x = torch.randn((max(ROWS), layer.in_features), device="cuda", dtype=torch.bfloat16)
        run = ops.linear_silu_mul if layer.silu_mul else ops.linear
        for cell in (cell for cell in cells if cell.layer is layer):
            if time.monotonic() < deadline_s:
                rows = x[: cell.num_rows]
                call = lambda index, rows=rows, run=run, weights=weights: run(rows, weights[index])  # noqa: E731
                found[layer.name, cell.num_rows] = _time(call, copies)
        del weight_NK, weights, x
        torch.cuda.empty_cache()
    return [cell._replace(bf16=found.get((cell.layer.name, cell.num_rows), math.nan)) for cell in cells]


def short(plan: Fp8Plan) -> str:
    """Its name in tables."""
    if plan.kind in ("library", "separate"):
        return plan.kind
    flags = f"{'s' if plan.swap else ''}{'p' if plan.persistent and plan.kind == 'tma' else ''}"
    if plan.kind == "rings":
        depths = f"{plan.num_stages}+{plan.x_stages}l{plan.lead}s{plan.store_parts}"
        return f"rings{plan.block_m}x{plan.block_n}.{depths}g{plan.group_m}"
    return f"{plan.kind}{plan.block_m}x{plan.block_n}w{plan.num_warps}.{plan.num_stages}{flags}"


def run(out: Path, budget_s: float) -> None:
    """Everything, within about `budget_s`."""
    start = time.monotonic()
    verdicts = fp8_vet.vet(max(2, min(14, os.cpu_count() or 2)), 0.5 * budget_s)
    sound = {(v.silu_mul, v.plan) for v in verdicts if not v.error and not v.differing}
    ops = CudaOps(torch.device("cuda"))
    cells: list[Cell] = []
    plain: dict[int, Fp8Plan] = {}
    for index, layer in enumerate(LAYERS):
        left_s = start + 0.8 * budget_s - time.monotonic()
        found = measure_layer(ops, layer, sound, plain, time.monotonic() + left_s / (len(LAYERS) - index))
        plain = {cell.num_rows: cell.own_plan for cell in found if not layer.silu_mul}
        cells += found
    out.mkdir(parents=True, exist_ok=True)
    _write(cells, out)
    fp8_questions.ask(ops)
    cells = with_bf16(ops, cells, start + budget_s)
    _write(cells, out)
    _print_verdicts(verdicts)
    _print_cells(cells)
    print(f"{time.monotonic() - start:.0f} s")


def _write(cells: list[Cell], out: Path) -> None:
    with (out / "fp8-measurements.jsonl").open("w") as file:
        for cell in cells:
            file.write(json.dumps(msgspec.to_builtins(cell._asdict())) + "\n")
    entries = tuple(
        Fp8Entry(
            out_features=cell.layer.outputs,
            in_features=cell.layer.in_features,
            max_rows=cell.num_rows,
            silu_mul=cell.layer.silu_mul,
            plan=cell.plan,
            otherwise=cell.own_plan if cell.plan.kind == "library" else None,
        )
        for cell in cells
    )
    write_table(entries, out / table_name())


def table_name() -> str:
    """Of this device's file, as among the committed ones."""
    return f"{file_stem(torch.cuda.get_device_name())}_fp8.json"


def write_table(entries: Sequence[Fp8Entry], path: Path) -> None:
    """The plan table of this device, to be put beside the committed ones."""
    name = torch.cuda.get_device_name()
    table = Fp8Table(device=name, versions=library_versions(), linear=tuple(entries))
    head = json.dumps(msgspec.to_builtins(msgspec.structs.replace(table, linear=())), indent=1)
    lines = ",\n  ".join(json.dumps(msgspec.to_builtins(entry)) for entry in entries)
    text = head.replace('"linear": []', f'"linear": [\n  {lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def sound_jobs(verdicts: Sequence[fp8_vet.Verdict]) -> set[fp8_vet.Job]:
    """Tells which are left out, and why."""
    for each in verdicts:
        if each.error or each.differing:
            print(f"left out: {short(each.plan)}: {each.error or f'{each.differing} values differ'}")
    return {(each.silu_mul, each.plan) for each in verdicts if not each.error and not each.differing}


def _print_verdicts(verdicts: list[fp8_vet.Verdict]) -> None:
    bad = [v for v in verdicts if v.error or v.differing]
    good = len(verdicts) - len(bad)
    print(f"\nplans: {len(verdicts)} of {len(fp8_vet.all_jobs())} tried, {good} have the reference's bits")
    for v in bad:
        print(f"  {'silu ' if v.silu_mul else ''}{short(v.plan)}: {v.error or f'{v.differing} values differ'}")


def _print_cells(cells: list[Cell]) -> None:
    print(
        "\nlayer            rows  best plan                     us   TFLOP/s  GB/s  /fast  /slow  /bf16  slow differs"
    )
    for c in cells:
        layer = c.layer
        flops = 2 * c.num_rows * layer.out_features * layer.in_features
        num_bytes = layer.out_features * layer.in_features + c.num_rows * (layer.in_features + 2 * layer.out_features)
        print(
            f"{layer.name:16s} {c.num_rows:4d}  {short(c.plan):26s} {c.ours * 1e3:7.1f} {flops / c.ours / 1e9:8.0f} "
            f"{num_bytes / c.ours / 1e6:6.0f}  {c.ours / c.fast:5.2f}  {c.ours / c.slow:5.2f}  {c.ours / c.bf16:5.2f}  "
            f"{c.library_differs}"
        )
    for name, pick in (("fast", lambda c: c.fast), ("slow", lambda c: c.slow), ("bf16", lambda c: c.bf16)):
        for label, chosen in (("rows <= 64", lambda c: c.num_rows <= 64), ("rows > 64", lambda c: c.num_rows > 64)):
            logs = [math.log(c.ours / pick(c)) for c in cells if chosen(c) and math.isfinite(c.ours / pick(c))]
            if logs:
                print(f"ours / {name}, {label}: geomean {math.exp(sum(logs) / len(logs)):.3f}")
