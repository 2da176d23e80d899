"""The parts of `gluon_try.py`, each run in processes of its own: one JSON line per finding on standard output."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
import triton

from benchmarks.gpu import candidates
from benchmarks.gpu import step as step_benchmark
from benchmarks.gpu.gemm import use_admitted_cublas
from benchmarks.gpu.linear_checks import outcomes
from benchmarks.gpu.shapes import LAYERS, Layer
from benchmarks.gpu.timing import interleaved_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.overlap import LAUNCH_FIRST
from cluster.engine.kernels.triton.plans import AttentionPlan, LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex

DECODE_ROWS = (1, 8, 32, 64)
PREFILL_ROWS = (8192, 4096)
CHECK_SHARES, WARM_SHARES = 12, 4
Key = tuple[int, int, bool]  # outputs, inputs, SwiGLU
DECODE_LAYERS: dict[str, Key] = {
    "gate_up": (14336, 4096, True),
    "down": (4096, 14336, False),
    "lm_head": (128256, 4096, False),
    "qkv": (6144, 4096, False),
    "o": (4096, 4096, False),
}


def stream_plans(num_rows: int) -> list[LinearPlan]:
    return list(
        dict.fromkeys(plan for silu in (False, True) for plan in candidates.stream(num_rows, silu_mul=silu))
    )  # fmt: skip


def plans_to_check() -> list[LinearPlan]:
    """Slow compiles first. Their places in this list name the plans."""
    hopper = [plan for silu in (False, True) for plan in candidates.hopper(4096, silu_mul=silu)]
    return list(dict.fromkeys([*hopper, *(plan for rows in DECODE_ROWS for plan in stream_plans(rows))]))


def _shares() -> list[list[int]]:
    """Plans that differ in their grid alone share a kernel, and so a process."""
    kernels: dict[LinearPlan, list[int]] = {}
    for index, plan in enumerate(plans_to_check()):
        kernel = msgspec.structs.replace(plan, persistent=True, programs_per_multiprocessor=1)
        kernels.setdefault(kernel, []).append(index)
    groups = list(kernels.values())
    return [[index for group in groups[share::CHECK_SHARES] for index in group] for share in range(CHECK_SHARES)]


def short(plan: LinearPlan) -> str:
    name = f"{plan.kind} {plan.block_m}x{plan.block_n}x{plan.block_k} s{plan.num_stages}"
    if plan.kind == "stream":
        grid = f"{plan.programs_per_multiprocessor}/SM" if plan.persistent else "tile"
        return f"{name} {'swap' if plan.swap else 'x·W'} {grid}"
    return f"{name} g{plan.group_m} p{plan.store_parts}"


def emit(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def check(share: int) -> None:
    """A line before each plan and after each case, so that a hang has a name."""
    ops = CudaOps(torch.device("cuda"))
    plans = plans_to_check()
    for index in _shares()[share]:
        emit({"begin": index})
        found = []
        try:
            for outcome in outcomes(ops, plans[index]):
                emit({"case": index})
                found += [outcome] if outcome else []
        except (triton.TritonError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {str(error)[-300:]}")
        emit({"checked": index, "failures": found, "plan": msgspec.to_builtins(plans[index])})


def warm(share: int) -> None:
    """Compile the table's plans and the small kernels in both orders of the wait, on a one-layer step."""
    step_benchmark.LAYERS, step_benchmark.VOCABULARY = 1, 1024
    decode = step_benchmark.DecodeStep(CudaOps(torch.device("cuda")))
    tables = decode.ops.plans
    for rows in DECODE_ROWS[share // 2 :: 2]:
        # the table's lm_head plan, though its weight is small here
        decode.ops.plans = Chosen(tables, {(1024, 4096, False): tables.linear(128256, 4096, rows, silu_mul=False)})  # type: ignore[assignment]
        decode.ops.pdl = (True, LAUNCH_FIRST)[share % 2]
        decode.run(*step_benchmark.decode_batch(rows, 256))
        torch.cuda.synchronize()
        emit({"warm": rows})


@dataclass
class Chosen:
    """The table's plans but for some layers."""

    table: PlanIndex
    by_layer: dict[Key, LinearPlan]

    @property
    def attention(self) -> AttentionPlan:
        return self.table.attention

    def linear(self, out_features: int, in_features: int, num_rows: int, *, silu_mul: bool) -> LinearPlan:
        plan = self.by_layer.get((out_features, in_features, silu_mul))
        return plan or self.table.linear(out_features, in_features, num_rows, silu_mul=silu_mul)


def entry(key: Key, num_rows: int, plan: LinearPlan) -> dict[str, object]:
    row = LinearEntry(out_features=key[0], in_features=key[1], silu_mul=key[2], max_rows=num_rows, plan=plan)
    return dict(msgspec.to_builtins(row))


class DecodeTrial:
    """Plans of one batch size, tried inside the graph of a whole step."""

    def __init__(self, decode: step_benchmark.DecodeStep, table: PlanIndex, num_rows: int) -> None:
        self.decode, self.table, self.num_rows = decode, table, num_rows
        self.inputs = step_benchmark.decode_batch(num_rows, 256)

    def call(self, by_layer: dict[Key, LinearPlan], pdl: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            self.decode.ops.plans = Chosen(self.table, by_layer)  # type: ignore[assignment]
            self.decode.ops.pdl = bool(pdl) if pdl != LAUNCH_FIRST else pdl
            return self.decode.run(*self.inputs)

        return run

    def times(self, variants: Sequence[tuple[dict[Key, LinearPlan], int]], rounds: int) -> list[float]:
        calls = [[self.call(*variant)] for variant in variants]
        return [statistics.median(times) for times in interleaved_ms(calls, rounds=rounds, min_ms=10)]

    def search(self, usable: Callable[[LinearPlan], bool], deadline_s: float) -> None:
        """All layers on the first plan that fits, in both orders; then layer by layer, largest first."""
        offered = {
            name: [plan for plan in candidates.stream(self.num_rows, silu_mul=key[2]) if usable(plan)]
            for name, key in DECODE_LAYERS.items()
        }
        start = {DECODE_LAYERS[name]: plans[0] for name, plans in offered.items() if plans}
        variants: list[tuple[dict[Key, LinearPlan], int]] = [
            ({}, 1), ({}, LAUNCH_FIRST), (start, 1), (start, LAUNCH_FIRST),
        ]  # fmt: skip
        base, base_first, plain, plain_first = self.times(variants, 5)
        self.emit("table", "all", base, None)
        self.emit("table, small kernels launch first", "all", base_first, None)
        self.emit("stream", "all", plain, next(iter(start.values()), None))
        self.emit("stream, small kernels launch first", "all", plain_first, next(iter(start.values()), None))
        pdl = LAUNCH_FIRST if plain_first < plain else 1
        chosen = dict(start)
        for name, plans in offered.items():
            if not plans or time.monotonic() > deadline_s:
                continue
            key = DECODE_LAYERS[name]
            options = [self.table.linear(*key[:2], self.num_rows, silu_mul=key[2]), *plans]
            found = self.times([(chosen | {key: plan}, pdl) for plan in options], 3)
            for plan, milliseconds in zip(options, found, strict=True):
                self.emit("try", name, milliseconds, plan)
            chosen[key] = options[found.index(min(found))]
        before, best, other = self.times([({}, 1), (chosen, pdl), (chosen, 3 - pdl)], 9)
        same = torch.equal(self.call({}, 1)(), self.call(chosen, pdl)())
        for what, milliseconds in (("table", before), ("chosen", best), ("chosen, other order", other)):
            self.emit(what, "final", milliseconds, None)
        emit({
            "rows": self.num_rows, "what": "entries", "pdl": pdl, "same_tokens": same, "ms": best, "table_ms": before,
            "entries": [entry(key, self.num_rows, plan) for key, plan in chosen.items()],
        })  # fmt: skip

    def emit(self, what: str, layer: str, milliseconds: float, plan: LinearPlan | None) -> None:
        line = {"rows": self.num_rows, "what": what, "layer": layer, "ms": milliseconds}
        emit(line | ({"plan": msgspec.to_builtins(plan), "short": short(plan)} if plan else {}))


def decode(good: set[int], deadline_s: float) -> None:
    usable = {plan for index, plan in enumerate(plans_to_check()) if index in good}
    ops = CudaOps(torch.device("cuda"))
    table = ops.plans
    whole = step_benchmark.DecodeStep(ops)
    emit({"what": "weights", "bytes": whole.weight_bytes})
    for position, rows in enumerate(DECODE_ROWS):
        left = deadline_s - time.monotonic()
        DecodeTrial(whole, table, rows).search(
            usable.__contains__, time.monotonic() + left / (len(DECODE_ROWS) - position) * 0.8
        )
        torch.cuda.empty_cache()


def prefill_calls(
    ops: CudaOps, layer: Layer, num_rows: int, good: set[int]
) -> Iterator[tuple[str, LinearPlan | None, Callable[[], object]]]:
    """What to time: the library's product alone, then this layer's operation by each plan."""
    silu = layer.name == "8b.gate_up"
    weight = ops.pack_linear(
        torch.randn((layer.out_features, layer.in_features), device="cuda", dtype=torch.bfloat16) * 0.02
    )
    x = torch.randn((num_rows, layer.in_features), device="cuda", dtype=torch.bfloat16)
    dtype = torch.float32 if layer.name == "8b.qkv" else torch.bfloat16
    wide = torch.empty((num_rows, layer.out_features), device="cuda", dtype=dtype)
    outputs = layer.out_features // 2 if silu else layer.out_features
    out = torch.empty((num_rows, outputs), device="cuda", dtype=dtype)
    library = {} if dtype == torch.bfloat16 else {"out_dtype": dtype}
    yield "torch.mm", None, lambda: torch.mm(x, weight.weight_NK.t(), out=wide, **library)
    offered = [plan for index, plan in enumerate(plans_to_check()) if index in good and plan.kind == "hopper"]
    table = ops.plans.linear(outputs, layer.in_features, num_rows, silu_mul=silu)
    for name, plan in [("table", table), *((short(plan), plan) for plan in offered)]:
        if candidates.fits(plan, silu_mul=silu):
            yield (
                name, plan,
                lambda plan=plan: ops.run_linear(x, weight, None, out, plan, silu_mul=silu),  # type: ignore[misc]
            )  # fmt: skip


def prefill(good: set[int]) -> None:
    ops = CudaOps(torch.device("cuda"))
    use_admitted_cublas()
    for layer in LAYERS[:4]:
        for num_rows in PREFILL_ROWS:
            names, plans, calls = zip(*prefill_calls(ops, layer, num_rows, good), strict=True)
            times = interleaved_ms([[call] for call in calls], rounds=6, min_ms=6)
            for name, plan, found in zip(names, plans, times, strict=True):
                milliseconds = statistics.median(found)
                flops = 2 * num_rows * layer.out_features * layer.in_features
                line = {
                    "layer": layer.name, "rows": num_rows, "name": name, "ms": milliseconds,
                    "tflops": flops / milliseconds / 1e9,
                    "vs_mm": statistics.median(a / b for a, b in zip(found, times[0], strict=True)),
                }  # fmt: skip
                silu = layer.name == "8b.gate_up"
                key = (layer.out_features // 2 if silu else layer.out_features, layer.in_features, silu)
                emit(line | ({"entry": entry(key, num_rows, plan)} if plan else {}))
            del calls
            torch.cuda.empty_cache()
