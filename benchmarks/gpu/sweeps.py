"""Trying plans: every GEMM candidate of every cell, then the best of them in turns with default cuBLAS."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import torch
import triton

from benchmarks.gpu import attention, gemm, tables
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, ROW_COUNTS, Layer
from benchmarks.gpu.timing import copy_bandwidth_tb_s
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import AttentionPlan, LinearPlan
from cluster.engine.kernels.triton.table import library_versions, load_plan_index

DECODE_CASES = ((32, 4096), (32, 32768), (128, 4096), (128, 32768), (1, 32768), (1, 4096))
PREFILL_CASES = ((16, 2048), (8, 2048), (2, 8192), (1, 32768))
PREFILL_PLANS = [AttentionPlan(prefill_kind="hopper", prefill_num_stages=stages) for stages in (2, 3, 4)] + [
    AttentionPlan(prefill_block_rows=rows, prefill_num_warps=warps, prefill_num_stages=5, prefill_use_tma=True)
    for rows, warps in ((64, 4), (128, 8))
]
SPLIT_PLANS = [
    AttentionPlan(split_num_warps=warps, split_num_stages=stages, split_programs_per_multiprocessor=programs)
    for warps in (2, 4)
    for stages in (3, 5)
    for programs in (2, 3, 4)
]
FINALISTS = 4
EPILOGUES = {"plain": False, "silu_mul": True}
_CANNOT_RUN = (triton.OutOfResources, triton.CompilationError, RuntimeError)


Offer = Callable[[int, bool], Iterable[LinearPlan]]  # plans worth trying for a row count, with SwiGLU or not


def all_candidates(num_rows: int, silu_mul: bool) -> Iterable[LinearPlan]:
    return candidates(num_rows, silu_mul=silu_mul)


def known_candidates(device: str) -> Offer:
    """Only what the device's table has for some weight."""
    entries = load_plan_index(device).entries()
    return lambda num_rows, silu_mul: tables.known_plans(entries, num_rows, silu_mul=silu_mul)


def compiled_plans(
    row_counts: Iterable[int], epilogues: Iterable[str], offer: Offer = all_candidates
) -> list[tuple[bool, LinearPlan]]:
    """(SwiGLU, plan) of every candidate, in an order that all processes share."""
    silu_muls = [EPILOGUES[name] for name in epilogues]
    every = {(silu, plan) for rows in row_counts for silu in silu_muls for plan in offer(rows, silu)}
    return sorted(every, key=str)


def compile_share(
    share: int, shares: int, row_counts: Iterable[int] = ROW_COUNTS, epilogues: Iterable[str] = tuple(EPILOGUES), *,
    is_known: bool = False,
) -> None:  # fmt: skip
    """Compile every GEMM candidate of this share into Triton's cache on disk."""
    ops = CudaOps(torch.device("cuda"))
    weight = ops.pack_linear(torch.zeros((1024, 512), device="cuda", dtype=torch.bfloat16))
    x = torch.zeros((256, 512), device="cuda", dtype=torch.bfloat16)
    offer = known_candidates(torch.cuda.get_device_name()) if is_known else all_candidates
    for silu, plan in compiled_plans(row_counts, epilogues, offer)[share::shares]:
        # fp32 too: bits are compared of the accumulators
        for dtype in (torch.bfloat16,) if plan.kind == "cublaslt" else (torch.bfloat16, torch.float32):
            out = torch.empty((256, 512 if silu else 1024), device="cuda", dtype=dtype)
            try:
                ops.run_linear(x, weight, None, out, plan, silu_mul=silu)
            except _CANNOT_RUN as error:
                print("cannot run", silu, plan, str(error)[:200])
    torch.cuda.synchronize()


def share_words(
    share: int, shares: int, row_counts: Iterable[int], epilogues: Iterable[str], *, is_known: bool = False
) -> tuple[str, ...]:  # fmt: skip
    """What follows `python -m benchmarks.gpu` for a process that compiles a share."""
    words = ("compile-share", str(share), str(shares), "--rows", *map(str, row_counts), "--epilogues", *epilogues)
    return (*words, "--known") if is_known else words


def compile_all(
    shares: int = 12, row_counts: Iterable[int] = ROW_COUNTS, epilogues: Iterable[str] = tuple(EPILOGUES), *,
    is_known: bool = False,
) -> None:  # fmt: skip
    """Processes share the work: compiling is one thread each."""
    command = [sys.executable, "-m", "benchmarks.gpu"]
    children = [
        subprocess.Popen([*command, *share_words(share, shares, row_counts, epilogues, is_known=is_known)])
        for share in range(shares)
    ]
    for child in children:
        child.wait(timeout=300)


def tune(out: Path, budget_s: float) -> None:
    """Write `measurements.jsonl` and the device's plan table. Half the budget goes to each stage at most."""
    compile_all()
    ops = CudaOps(torch.device("cuda"))
    start = time.monotonic()
    finalists: dict[tuple[str, int], list[gemm.Measurement]] = defaultdict(list)

    def keep(measured: gemm.Measurement) -> None:
        if measured.plan is not None and not measured.error and measured.differing == 0:
            finalists[measured.layer, measured.num_rows].append(measured)

    gemm.sweep(ops, (*LAYERS, *FUSED_LAYERS), ROW_COUNTS, keep, start + budget_s / 2)
    measurements = out / "measurements.jsonl"
    with measurements.open("w") as file:
        for layer in (*LAYERS, *FUSED_LAYERS):
            if time.monotonic() > start + budget_s:
                break
            for line in _compare_layer(ops, layer, finalists):
                file.write(json.dumps(line) + "\n")
    name = torch.cuda.get_device_name()
    table = tables.make_table(measurements, name, library_versions(), ops.plans.attention)
    tables.write_table(table, out / f"{tables.file_stem(name)}.json")


def _compare_layer(
    ops: CudaOps, layer: Layer, finalists: dict[tuple[str, int], list[gemm.Measurement]]
) -> list[dict[str, object]]:
    bench = gemm.LayerBench(ops, layer, max(ROW_COUNTS))
    lines: list[dict[str, object]] = []
    for num_rows in ROW_COUNTS:
        ranked = sorted(finalists[layer.name, num_rows], key=lambda measured: measured.milliseconds)
        plans = [measured.plan for measured in ranked[:FINALISTS] if measured.plan is not None]
        library = LinearPlan(kind="cublaslt")
        if any(measured.plan == library for measured in ranked[FINALISTS:]):
            plans.append(library)
        if not plans:
            continue
        base, ours = bench.compare(plans, num_rows)
        lines += [
            {
                "layer": layer.name,
                "num_rows": num_rows,
                "plan": msgspec.to_builtins(plan),
                "ms": times,
                "base_ms": base,
            }
            for plan, times in zip(plans, ours, strict=True)
        ]
    return lines


def sweep_attention(out: Path, budget_s: float) -> None:
    """One line per case and plan in `attention-sweep.jsonl`, prefill beside SDPA's backends."""
    deadline = time.monotonic() + budget_s
    copy_tb_s = copy_bandwidth_tb_s()
    with (out / "attention-sweep.jsonl").open("w") as file:
        for batch, length in PREFILL_CASES:
            inputs = attention.paged_inputs([length] * batch, [length] * batch, num_layers=1)
            case: dict[str, object] = {"batch": batch, "context": length, "sdpa_ms": attention.sdpa_ms(batch, length)}
            for plan in PREFILL_PLANS:
                if time.monotonic() < deadline:
                    line = case | {"plan": msgspec.to_builtins(plan), "ms": attention.prefill_ms(plan, inputs)}
                    file.write(json.dumps(line) + "\n")
            del inputs
        for batch, context in DECODE_CASES:
            layers = 1 if batch * context > 2**21 else 4
            inputs = attention.paged_inputs([1] * batch, [context] * batch, num_layers=layers)
            for plan in SPLIT_PLANS:
                if time.monotonic() < deadline:
                    ms, fraction = attention.decode_fraction(batch, context, plan, copy_tb_s, inputs)
                    line = {"batch": batch, "context": context, "plan": msgspec.to_builtins(plan), "ms": ms}
                    file.write(json.dumps(line | {"bandwidth_fraction": fraction}) + "\n")
            del inputs
            torch.cuda.empty_cache()
