"""FP8 products under sustained load: the plan of the table against those of the kernel for many rows, and for fewer
rows against every other.

`python -m benchmarks.gpu.sustained --fp8`, within its budget: plans are tried and compiled in processes of their own
first, since one that hangs would take everything with it. Then each layer of an 8B model at 128 to 8,192 rows, plans
taking turns of a twentieth of a second. `--out DIR` gets the device's table with the plans that were faster.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu import fp8_candidates, fp8_vet, sustained
from benchmarks.gpu.clocks import FP8_FLOP_PER_CLOCK
from benchmarks.gpu.fp8 import short, sound_jobs, table_name, write_table
from benchmarks.gpu.fp8_layers import LAYERS, HardOperands, random_weights
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.turns import Turns
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import CHANNEL_CHAIN
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry

_ROWS = (8192, 2048, 4096, 1024, 512, 256, 128)  # what matters most comes first
_MOST_ROWS_OF_ALL_KINDS = 1024  # above only rings compete
_COLD_BYTES = 200 << 20
_TURN_S = 0.05
_ROUNDS = 2
_HARD_ROWS = 256


class Cell(NamedTuple):
    layer: Layer
    num_rows: int
    plans: list[Fp8Plan]  # the table's first
    turns: list[Turns]

    @property
    def ms(self) -> list[float]:
        return [turns.median_ms for turns in self.turns]

    @property
    def flop(self) -> float:
        return 2.0 * self.num_rows * self.layer.out_features * self.layer.in_features

    @property
    def best(self) -> int:
        return min(range(1, len(self.ms)), key=lambda index: self.ms[index], default=0)


class Fp8LayerBench:
    """One layer's weights and quantised rows. Of the kernel alone: what quantises its result is the same for all."""

    def __init__(self, ops: CudaOps, layer: Layer) -> None:
        self.layer = layer
        self._fp8, self._silu_mul = ops.fp8, layer.silu_mul
        self.out_features = layer.outputs
        self.weights = random_weights(ops.fp8, layer, _COLD_BYTES)
        x = torch.randn((max(_ROWS), layer.in_features), device="cuda", dtype=torch.bfloat16)
        self.rows = ops.fp8.quantized(x, self.weights[0])
        self._hard = HardOperands(
            ops.fp8, layer.out_features, layer.in_features, _HARD_ROWS, seed=4, reveals_order=True
        )  # fmt: skip
        self._expected = torch.empty((max(_ROWS), self.out_features), device="cuda", dtype=torch.bfloat16)
        self.run(REFERENCE_FP8, max(_ROWS), 0, self._expected)

    def run(
        self, plan: Fp8Plan, num_rows: int, index: int, out: torch.Tensor, *, chain: int = CHANNEL_CHAIN
    ) -> None:  # fmt: skip
        self._fp8.run_linear(
            self.rows[:num_rows], self.weights[index], None, out, plan, silu_mul=self._silu_mul, chain=chain
        )  # fmt: skip

    def differing(self, plan: Fp8Plan, num_rows: int) -> int:
        """Values that differ from the reference's, poisoned before; and of inputs that reveal another order."""
        out = torch.full((num_rows, self.out_features), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.run(plan, num_rows, 0, out)
        found = int((out != self._expected[:num_rows]).sum())
        hard = [
            self._hard.run(used, _HARD_ROWS, torch.bfloat16, silu_mul=self._silu_mul) for used in (plan, REFERENCE_FP8)
        ]
        return found + int((hard[0] != hard[1]).sum())


def run(budget_s: float, out: Path | None) -> None:
    """Print each cell, then one table."""
    start_s = time.monotonic()
    verdicts = fp8_vet.vet(max(2, min(14, os.cpu_count() or 2)), 0.6 * budget_s, wanted_jobs().__contains__)
    sound = sound_jobs(verdicts)
    print(f"{len(sound)} plans compiled and tried in {time.monotonic() - start_s:.0f} s", flush=True)
    ops = CudaOps(torch.device("cuda"))
    layers = [layer for layer in LAYERS if layer.name != "8b.gate_up"]  # SwiGLU is fused into it
    cells: list[Cell] = []
    for number, layer in enumerate(layers):
        bench = Fp8LayerBench(ops, layer)
        left_s = (budget_s - (time.monotonic() - start_s)) / (len(layers) - number)
        deadline_s = time.monotonic() + left_s
        for num_rows in _ROWS:
            plans = _plans(ops, layer, num_rows, bench.out_features, sound)
            if time.monotonic() + _TURN_S * len(plans) * (_ROUNDS + 1) > deadline_s:
                print(f"no time left: {layer.name}, {num_rows} rows")
                continue
            plans = sustained.sound_plans(bench, plans, num_rows)
            cells.append(Cell(layer, num_rows, plans, sustained.measure(bench, plans, num_rows, _TURN_S, _ROUNDS)))
            _print_cell(cells[-1])
        del bench
        torch.cuda.empty_cache()
    _print_table(cells)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_table(with_faster_plans(ops.fp8.plans.entries(), cells), out / table_name())
    print(f"{time.monotonic() - start_s:.0f} s")


def with_faster_plans(entries: list[Fp8Entry], cells: list[Cell]) -> list[Fp8Entry]:
    """A table's entries, those of the measured shapes and rows with the fastest plan. A plan in several kernels stays:
    another one was measured in its place."""
    faster = {}
    for cell in cells:
        if cell.ms[cell.best] < cell.ms[0]:
            key = cell.layer.outputs, cell.layer.in_features, cell.num_rows, cell.layer.silu_mul
            faster[key] = cell.plans[cell.best]
    found = []
    for entry in entries:
        plan = faster.get((entry.out_features, entry.in_features, entry.max_rows, entry.silu_mul))
        stays = plan is None or entry.plan.kind == "separate"
        found.append(entry if stays else msgspec.structs.replace(entry, plan=plan, otherwise=None))
    return found


def offered(num_rows: int, *, silu_mul: bool) -> list[Fp8Plan]:
    """What competes with the table's plan."""
    if num_rows <= _MOST_ROWS_OF_ALL_KINDS:
        return fp8_candidates.candidates(num_rows, silu_mul=silu_mul)
    return list(fp8_candidates.rings(silu_mul=silu_mul))


def wanted_jobs() -> set[fp8_vet.Job]:
    """All plans that compete somewhere; those that the table may name for these rows are among them."""
    return {(silu, plan) for silu in (False, True) for rows in _ROWS for plan in offered(rows, silu_mul=silu)}


def _plans(
    ops: CudaOps, layer: Layer, num_rows: int, out_features: int, sound: set[fp8_vet.Job]
) -> list[Fp8Plan]:  # fmt: skip
    mine = ops.fp8.plans.linear(out_features, layer.in_features, num_rows, silu_mul=layer.silu_mul)
    if mine.kind == "separate":
        mine = next(fp8_candidates.rings(silu_mul=layer.silu_mul))
    others = [plan for plan in offered(num_rows, silu_mul=layer.silu_mul) if (layer.silu_mul, plan) in sound]
    return list(dict.fromkeys([mine, *others]))


def _print_cell(cell: Cell) -> None:
    ranked = sorted(zip(cell.turns, cell.plans, strict=True), key=lambda pair: pair[0].median_ms)
    words = []
    for turns, plan in ranked:
        load = turns.load(cell.flop, FP8_FLOP_PER_CLOCK)
        words.append(f"{short(plan)}={turns.median_ms * 1e3:.1f}us{f',{load}' if load else ''}")
    print(f"{cell.layer.name} {cell.num_rows}: {' '.join(words)}", flush=True)


def _print_table(cells: list[Cell]) -> None:
    """Ratios of time, new to old; a layer's products together say what a step of that many rows gains."""
    side = f"{'us':>8s} {'TFLOP/s':>8s} {'load':18s}"
    print(f"\n{'layer':16s} {'rows':>5s}  table's {side} best's {side} ratio  plan")
    for cell in cells:
        base, best = (_figures(cell, index) for index in (0, cell.best))
        ratio = cell.ms[cell.best] / cell.ms[0]
        print(
            f"{cell.layer.name:16s} {cell.num_rows:5d}          {base}        {best} {ratio:.3f}  "
            f"{short(cell.plans[cell.best])}"
        )
    for num_rows in sorted({cell.num_rows for cell in cells}):
        some = [cell for cell in cells if cell.num_rows == num_rows]
        old, new = sum(cell.ms[0] for cell in some), sum(cell.ms[cell.best] for cell in some)
        words = f"{len(some)} products at {num_rows} rows"
        print(f"{words}: {old * 1e3:.0f} us, with the best {new * 1e3:.0f} us: {new / old:.3f}")
    ratios = [math.log(cell.ms[cell.best] / cell.ms[0]) for cell in cells]
    if ratios:
        print(f"geomean of the ratios: {math.exp(sum(ratios) / len(ratios)):.3f}")


def _figures(cell: Cell, index: int) -> str:
    milliseconds, load = cell.ms[index], cell.turns[index].load(cell.flop, FP8_FLOP_PER_CLOCK)
    return f"{milliseconds * 1e3:8.1f} {cell.flop / milliseconds / 1e9:8.0f} {load:18s}"
