"""The figures that are published: the committed plans against the libraries' defaults, taking turns in one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import attention, gemm
from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, ROW_COUNTS, Layer
from benchmarks.gpu.step import DecodeStep, step_ms
from benchmarks.gpu.timing import copy_bandwidth_tb_s, interleaved_ms
from benchmarks.results import append_result
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.ops import AttentionMetadata

_MODEL_LAYERS = 32  # of an 8B model: as many attentions are in the graph of its step
_MOST_KEYS = 1 << 22  # of all layers together, 4 KiB each
DECODE_CASES = ((32, 4096), (32, 32768), (128, 4096), (128, 32768), (1, 32768))
PREFILL_CASES = ((16, 2048), (8, 2048), (2, 8192), (1, 32768))


def _append(name: str, metric: str, value: float, unit: str, params: Mapping[str, str | int], out: Path) -> None:
    print(f"{name}.{metric} = {value:.4g} {unit} {params}")
    append_result(name, metric, value, unit, dict(params), device=torch.cuda.get_device_name(), directory=out)


def _ratio(ops: CudaOps, bench: gemm.LayerBench, layer: Layer, num_rows: int) -> float:
    """Median over rounds of our time over default cuBLAS, the plan as the engine would choose it."""
    plan = ops.plans.linear(bench.out_features, layer.in_features, num_rows, silu_mul=layer.silu_mul)
    differing = bench.differing(plan, num_rows)
    if differing:
        raise AssertionError(f"{layer.name} at {num_rows} rows: {differing} values differ from the reference, {plan}")
    base, (ours,) = bench.compare([plan], num_rows)
    return statistics.median(a / b for a, b in zip(ours, base, strict=True))


def record_gemm(out: Path) -> None:
    """Every cell's bits are compared again; a difference stops the run."""
    ops = CudaOps(torch.device("cuda"))
    ratios: dict[tuple[str, int], float] = {}
    for layer in (*LAYERS, *FUSED_LAYERS):
        bench = gemm.LayerBench(ops, layer, max(ROW_COUNTS))
        for num_rows in ROW_COUNTS:
            ratios[layer.name, num_rows] = _ratio(ops, bench, layer, num_rows)
        print(layer.name, [round(ratios[layer.name, rows], 3) for rows in ROW_COUNTS])
        del bench
        torch.cuda.empty_cache()
    fused = {layer.name for layer in FUSED_LAYERS}
    for benchmark, chosen in (
        ("gemm", {cell: ratio for cell, ratio in ratios.items() if cell[0] not in fused}),
        ("gemm_silu_mul", {cell: ratio for cell, ratio in ratios.items() if cell[0] in fused}),
    ):
        worst = max(chosen, key=lambda cell: chosen[cell])
        geomean = math.exp(statistics.fmean(math.log(ratio) for ratio in chosen.values()))
        _append(benchmark, "ratio_geomean", geomean, "x", {"cells": len(chosen)}, out)
        _append(benchmark, "ratio_worst", chosen[worst], "x", {"layer": worst[0], "rows": worst[1]}, out)


def _sdpa_calls(batch: int, length: int) -> dict[str, list[Callable[[], object]]]:
    shape = (batch, length, 32, 128)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn((batch, length, 8, 128), device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")

    def call(backend: SDPBackend) -> Callable[[], object]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    return {b.name: [call(b)] for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)}


def _attention_call(
    ops: CudaOps, q: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata
) -> Callable[[], torch.Tensor]:
    return lambda: ops.attention(q, kv[:, 0], metadata, q.shape[2] ** -0.5)


def record_attention(out: Path) -> None:
    """Decode as KV bytes per second over copy bandwidth, prefill over the fastest SDPA backend."""
    ops = CudaOps(torch.device("cuda"))
    copy_tb_s = copy_bandwidth_tb_s()
    _append("attention", "copy_bandwidth", copy_tb_s, "TB/s", {}, out)
    for batch, context in DECODE_CASES:
        layers = max(1, min(_MODEL_LAYERS, _MOST_KEYS // (batch * context)))
        inputs = attention.paged_inputs([1] * batch, [context] * batch, num_layers=layers)
        _, fraction = attention.decode_fraction(batch, context, ops.plans.attention, copy_tb_s, inputs)
        _append("attention", "decode_bandwidth_fraction", fraction, "x", {"batch": batch, "context": context}, out)
        del inputs
        torch.cuda.empty_cache()
    for batch, length in PREFILL_CASES:
        q, kv, metadata = attention.paged_inputs([length] * batch, [length] * batch, num_layers=1)
        sdpa = _sdpa_calls(batch, length)
        ours = [_attention_call(ops, q, kv, metadata)]
        *theirs, mine = interleaved_ms([*sdpa.values(), ours], min_ms=5)
        medians = [statistics.median(times) for times in theirs]
        fastest = medians.index(min(medians))
        ratio = statistics.median(a / b for a, b in zip(theirs[fastest], mine, strict=True))
        params: dict[str, str | int] = {"batch": batch, "context": length, "backend": list(sdpa)[fastest]}
        _append("attention", "prefill_ratio_vs_sdpa", ratio, "x", params, out)
        del q, kv, metadata, sdpa, ours
        torch.cuda.empty_cache()


def record_steps(out: Path, *, has_fp8: bool = False) -> None:
    """All operations of a decode step of the 8B shape in one graph; no scheduler, no sampling parameters."""
    ops = CudaOps(torch.device("cuda"))
    decode = DecodeStep(ops, has_fp8=has_fp8)
    name = "decode_step_8b_fp8" if has_fp8 else "decode_step_8b"
    for batch in (1, 32, 256):
        whole, gemms = step_ms(decode, batch, 256)
        params = {"batch": batch, "context": 256}
        _append(name, "graph_ms", whole, "ms", params, out)
        _append(name, "gemms_ms", gemms, "ms", params, out)
