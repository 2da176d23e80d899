"""`python -m benchmarks.gpu <what>`: measurements on one CUDA device, JSON lines and a short table."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import torch
import triton

from benchmarks.gpu import attention, gemm, record, step
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, ROW_COUNTS
from benchmarks.gpu.timing import copy_bandwidth_tb_s, interleaved_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.plans import AttentionPlan, LinearPlan

DECODE_CASES = ((32, 4096), (32, 32768), (128, 4096), (128, 32768), (1, 32768), (1, 4096))
PREFILL_CASES = ((16, 2048), (8, 2048), (2, 8192), (1, 32768))

PREFILL_PLANS = [
    AttentionPlan(prefill_kind="hopper", prefill_num_stages=stages, prefill_persistent=persistent)
    for stages, persistent in ((2, True), (3, True), (4, True), (2, False))
] + [
    AttentionPlan(prefill_block_rows=rows, prefill_num_warps=warps, prefill_num_stages=stages, prefill_use_tma=True)
    for rows, warps, stages in ((64, 4, 5),)
]


def compile_share(share: int, shares: int) -> None:
    """Compile every GEMM candidate of this share into Triton's cache on disk."""
    ops = CudaOps(torch.device("cuda"))
    plans = sorted({(silu, p) for rows in ROW_COUNTS for silu in (False, True) for p in candidates(rows, silu_mul=silu)}, key=str)
    weight = ops.pack_linear(torch.zeros((1024, 512), device="cuda", dtype=torch.bfloat16))
    x = torch.zeros((256, 512), device="cuda", dtype=torch.bfloat16)
    for silu, plan in plans[share::shares]:
        out = torch.empty((256, 512 if silu else 1024), device="cuda", dtype=torch.bfloat16)
        try:
            ops.run_linear(x, weight, None, out, plan, silu_mul=silu)
        except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
            print("cannot run", silu, plan, str(error)[:200])
    torch.cuda.synchronize()


def compile_all(shares: int = 12) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu", "compile-share"]
    children = [subprocess.Popen([*command, str(i), str(shares)]) for i in range(shares)]
    for child in children:
        child.wait(timeout=300)
    print(f"compiled in {time.monotonic() - start:.0f} s")


def sweep_gemm(out: Path, budget_s: float, layers: str, rows: str) -> None:
    ops = CudaOps(torch.device("cuda"))
    chosen = [layer for layer in (*LAYERS, *FUSED_LAYERS) if not layers or layer.name in layers.split(",")]
    row_counts = [int(r) for r in rows.split(",")] if rows else list(ROW_COUNTS)
    base: dict[tuple[str, int], float] = {}
    with out.open("a") as file:

        def emit(measured: gemm.Measurement) -> None:
            record = measured._asdict() | {"plan": msgspec.to_builtins(measured.plan)}
            file.write(json.dumps(record) + "\n")
            file.flush()
            key = (measured.layer, measured.num_rows)
            if measured.plan is None:
                base[key] = measured.milliseconds
            elif not measured.error and measured.differing == 0:
                best[key] = min(best.get(key, float("inf")), measured.milliseconds)

        best: dict[tuple[str, int], float] = {}
        gemm.sweep(ops, chosen, row_counts, emit, time.monotonic() + budget_s)
    for layer in chosen:
        cells = [f"{m}:{best[k] / base[k]:.2f}" for m in row_counts if (k := (layer.name, m)) in best]
        print(f"{layer.name:18s}", " ".join(cells))


def compare_gemm(out: Path, shortlist: Path, budget_s: float, rows: str) -> None:
    """Interleaved: default cuBLAS and the shortlisted plans of each cell; bits checked again."""
    ops = CudaOps(torch.device("cuda"))
    short = json.loads(shortlist.read_text())
    deadline = time.monotonic() + budget_s
    with out.open("a") as file:
        for layer in (*LAYERS, *FUSED_LAYERS):
            if time.monotonic() > deadline:
                break
            bench = gemm.LayerBench(ops, layer, max(ROW_COUNTS))
            cells = []
            for num_rows in [int(r) for r in rows.split(",")] if rows else ROW_COUNTS:
                plans = [msgspec.convert(p, LinearPlan) for p in short[layer.name][str(num_rows)]]
                admitted = [plan for plan in plans if bench.differing(plan, num_rows) == 0]
                if len(admitted) != len(plans):
                    print("not admitted", layer.name, num_rows, [p for p in plans if p not in admitted])
                base, ours = bench.compare(admitted, num_rows)
                for plan, times in zip(admitted, ours, strict=True):
                    record = {"layer": layer.name, "num_rows": num_rows, "plan": msgspec.to_builtins(plan), "ms": times, "base_ms": base}
                    file.write(json.dumps(record) + "\n")
                best = min(statistics.median(a / b for a, b in zip(times, base, strict=True)) for times in ours)
                cells.append(f"{num_rows}:{best:.2f}")
            print(f"{layer.name:18s}", " ".join(cells))
            del bench
            torch.cuda.empty_cache()


def sweep_attention(out: Path, budget_s: float) -> None:
    deadline = time.monotonic() + budget_s
    copy_tb_s = copy_bandwidth_tb_s()
    print(f"copy {copy_tb_s:.2f} TB/s")
    records: list[dict[str, object]] = [{"copy_tb_s": copy_tb_s}]
    for keys in (64,):
        launch.block_kv = lambda head_size, keys=keys: keys  # type: ignore[misc]
        for batch, length in PREFILL_CASES:
            if keys == 64:
                by_backend = attention.sdpa_ms(batch, length)
                sdpa_best[batch, length] = min(by_backend.values())
                records.append({"sdpa": by_backend, "batch": batch, "length": length})
                print("sdpa", batch, length, {k: round(v, 3) for k, v in by_backend.items()})
            inputs = attention.paged_inputs([length] * batch, [length] * batch, block_size=max(64, keys), num_layers=1)
            for plan in PREFILL_PLANS:
                        if time.monotonic() > deadline:
                            continue
                        try:
                            milliseconds = attention.prefill_ms(plan, inputs)
                        except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
                            print("cannot run", plan, str(error)[:150])
                            continue
                        ratio = sdpa_best[batch, length] / milliseconds
                        records.append({"prefill": milliseconds, "ratio": ratio, "keys": keys, "batch": batch, "length": length, "plan": msgspec.to_builtins(plan)})
                        print(f"prefill kv{keys} {batch}x{length} {plan.prefill_kind} persistent{plan.prefill_persistent:d} s{plan.prefill_num_stages}: {milliseconds:.3f} ms ratio {ratio:.2f}")
            del inputs
        for batch, context in DECODE_CASES:
            layers = 1 if batch * context > 2**21 else 4
            inputs = attention.paged_inputs([1] * batch, [context] * batch, block_size=max(64, keys), num_layers=layers)
            for warps in (4,):
                for stages in (5,):
                    for programs in (2, 4):
                        if time.monotonic() > deadline:
                            continue
                        plan = AttentionPlan(split_num_warps=warps, split_num_stages=stages, split_programs_per_multiprocessor=programs)
                        try:
                            milliseconds, fraction = attention.decode_fraction(batch, context, plan, copy_tb_s, inputs)
                        except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
                            print("cannot run", plan, str(error)[:150])
                            continue
                        records.append({"decode": milliseconds, "fraction": fraction, "keys": keys, "batch": batch, "context": context, "plan": msgspec.to_builtins(plan)})
                        print(f"decode kv{keys} {batch}x{context} w{warps} s{stages} p{programs}: {milliseconds:.4f} ms {fraction:.3f}")
            del inputs
            torch.cuda.empty_cache()
        out.write_text("\n".join(json.dumps(record) for record in records))


sdpa_best: dict[tuple[int, int], float] = {}


def decode_steps() -> None:
    """Steps of the 8B shape, our ops, one graph each; the residual in bf16 and in fp32."""
    copy_tb_s = copy_bandwidth_tb_s()
    for residual in (torch.bfloat16, torch.float32):
        ops = CudaOps(torch.device("cuda"), residual_dtype=residual)
        for qkv in (torch.bfloat16, torch.float32):
            decode = step.DecodeStep(ops, qkv)
            floor_ms = decode.weight_bytes / copy_tb_s / 1e9
            for batch in (1, 16, 32, 64, 128, 256):
                whole, gemms = step.step_ms(decode, batch, 256)
                print(f"step residual {residual} qkv {qkv} batch {batch}: {whole:.3f} ms, gemms {gemms:.3f}, weights' floor {floor_ms:.3f}")
            del decode
            torch.cuda.empty_cache()


def fp32_results() -> None:
    """May cuBLASLt serve fp32 results? Bits against the chain, and time against its bf16 result."""
    ops = CudaOps(torch.device("cuda"))
    for layer in LAYERS[:4]:
        bench = gemm.LayerBench(ops, layer, 8192)
        weight = bench.weights[0].weight_NK
        for num_rows in (32, 64, 128, 256, 512, 2048, 8192):
            for name, x in (("plain", bench.x), ("hard", bench.hard_x)):
                rows = min(num_rows, 512)
                expected = torch.empty((rows, layer.out_features), device="cuda")
                ops.run_linear(x[:rows], bench.weights[0], None, expected, gemm.REFERENCE_LINEAR, silu_mul=False)
                try:
                    out = torch.mm(x[:num_rows], weight.t(), out_dtype=torch.float32)
                except RuntimeError as error:
                    print(layer.name, str(error)[:200])
                    return
                differing = int((out[:rows].view(torch.int32) != expected.view(torch.int32)).sum())
                print("fp32 cublaslt", layer.name, num_rows, name, "differing", differing)
            x = bench.x[:num_rows]
            wide = torch.empty((num_rows, layer.out_features), device="cuda")
            table_plan = ops.plans.linear(layer.out_features, layer.in_features, num_rows, silu_mul=False)
            tma = LinearPlan(kind="tma", block_m=128, block_n=256, block_k=64, num_stages=3, num_warps=8, store_parts=2)
            calls = [
                [lambda x=x, w=w: torch.mm(x, w.weight_NK.t(), out_dtype=torch.float32) for w in bench.weights],
                [lambda x=x, w=w: torch.mm(x, w.weight_NK.t()) for w in bench.weights],
                [lambda x=x, w=w, wide=wide: ops.run_linear(x, w, None, wide, tma, silu_mul=False) for w in bench.weights],
            ]
            times = interleaved_ms(calls)
            print("  ms: fp32 lt, bf16 lt, fp32 tma", [round(statistics.median(t), 4) for t in times], table_plan.kind)
        del bench
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shortlist", type=Path)
    parser.add_argument("--budget", type=float, default=240)
    parser.add_argument("--layers", default="")
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
    match options.what:
        case "compile-share":
            compile_share(*options.numbers)
        case "compile":
            compile_all()
        case "sweep-gemm":
            sweep_gemm(options.out, options.budget, options.layers, options.rows)
        case "gemm":
            record.record_gemm(options.out)
        case "attention":
            record.record_attention(options.out)
        case "decode-step":
            record.record_steps(options.out)
        case "steps":
            decode_steps()
        case "fp32":
            fp32_results()
        case "compare-gemm":
            compare_gemm(options.out, options.shortlist, options.budget, options.rows)
        case "sweep-attention":
            sweep_attention(options.out, options.budget)


if __name__ == "__main__":
    main()
