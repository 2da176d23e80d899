"""The published figures of the whole engine, beside a peer's from the same machine and hour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.gpu.engine import EngineBench, make_bench
from benchmarks.gpu.exactness import Cell, Exactness, compare, make_requests, standard_cells
from benchmarks.gpu.random_model import DEEPSEEK_V2_LITE, LLAMA_8B, QWEN3_30B_A3B, random_decoder
from benchmarks.gpu.timing import copy_bandwidth_tb_s
from benchmarks.results import append_result
from cluster.engine.kernels.cuda_ops import CudaOps

BATCHES = (1, 32, 256)
PEER_MIXED, PEER_PREFILL = 512, (16, 2048)
_Append = Callable[[str, float, str, dict[str, Any]], None]


def _appender(benchmark: str, out: Path) -> _Append:
    def append(metric: str, value: float, unit: str, params: dict[str, Any]) -> None:
        print(f"{benchmark}.{metric} = {value:.4g} {unit} {params}", flush=True)
        append_result(benchmark, metric, value, unit, params, device=torch.cuda.get_device_name(), directory=out)

    return append


def peer_figures(path: Path | None) -> dict[str, Any]:
    """From the JSON lines of the peer's script, default mode: prefill and mixed tok/s, decode ms by batch."""
    figures: dict[str, Any] = {"decode": {}}
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        found = json.loads(line)
        match found:
            case {"what": "prefill", "tok_s": value}:
                figures["prefill"] = value
            case {"what": "decode", "batch": batch, "inter_token_ms": value}:
                figures["decode"][batch] = value
            case {"what": "mixed", "total_tok_s": value}:
                figures["mixed"] = value
    return figures


def record_engine(out: Path, peer: Path | None = None) -> None:
    """`engine_8b`: always invariant, greedy, random prompts, the peer's formulas."""
    append = _appender("engine_8b", out)
    figures = peer_figures(peer)
    copy_tb_s = copy_bandwidth_tb_s()
    bench = make_bench()
    weights = bench.weight_bytes
    pool = bench.engine.num_blocks * bench.engine.layout.block_bytes
    count, length = PEER_PREFILL
    prefill = bench.prefill_tokens_per_s(count, length)
    append("prefill_tok_s", prefill, "tok/s", {"prompts": count, "tokens": length})
    if "prefill" in figures:
        append("prefill_ratio_vs_vllm", prefill / figures["prefill"], "x", {"vllm_tok_s": figures["prefill"]})
    for batch in BATCHES:
        milliseconds = bench.decode_ms(batch)
        append("decode_ms", milliseconds, "ms", {"batch": batch, "context": 256})
        if batch in figures["decode"]:
            theirs = figures["decode"][batch]
            append("decode_ratio_vs_vllm", theirs / milliseconds, "x", {"batch": batch, "vllm_ms": theirs})
        if batch == 1:
            bytes_read = weights + 256 * bench.engine.layout.block_bytes // bench.engine.layout.block_size
            floor_ms = bytes_read / copy_tb_s / 1e9
            params = {"batch": 1, "copy_tb_s": round(copy_tb_s, 3)}
            append("roofline_fraction", floor_ms / milliseconds, "x", params)
    append("host_fraction", bench.host_fraction(256), "x", {"batch": 256})
    mixed = bench.mixed(PEER_MIXED)
    append("mixed_tok_s", mixed.tokens_per_s, "tok/s", {"requests": PEER_MIXED})
    if "mixed" in figures:
        append("mixed_ratio_vs_vllm", mixed.tokens_per_s / figures["mixed"], "x", {"vllm_tok_s": figures["mixed"]})
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 2
    others = (torch.cuda.max_memory_allocated() - weights - embedding - pool) / 2**30
    append("memory_beside_weights_and_pool_gib", others, "GiB", {"pool_gib": round(pool / 2**30, 2)})
    _record_more_shapes(bench, append)


def _record_more_shapes(bench: EngineBench, append: _Append) -> None:
    """Not in the peer's table: long contexts, a few sequences, sampled with logprobs."""
    for batch, context in ((8, 128), (1, 7000), (32, 3000)):
        milliseconds = bench.decode_ms(batch, prompt=context, out=64, rounds=2)
        append("decode_ms", milliseconds, "ms", {"batch": batch, "context": context + 32})
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "logprobs": 1}
    milliseconds = bench.decode_ms(32, out=64, rounds=2, **sampled)
    append("decode_ms", milliseconds, "ms", {"batch": 32, "context": 160, **sampled})


def record_exactness(out: Path, num_requests: int = 48, num_tokens: int = 8) -> None:
    """`exactness_gpu`: an 8B-shaped Llama, a Qwen3-30B-A3B and a DeepSeek-V2-Lite cut to a few layers, each request
    alone against every cell."""
    append = _appender("exactness_gpu", out)
    models = {
        "llama 8B": LLAMA_8B,
        "qwen3 30B A3B, 6 layers": msgspec.structs.replace(QWEN3_30B_A3B, num_layers=6),
        "deepseek V2 Lite, 4 layers": msgspec.structs.replace(DEEPSEEK_V2_LITE, num_layers=4),
    }
    for name, config in models.items():
        ops = CudaOps(torch.device("cuda"))
        model = random_decoder(config, ops, max_position=4096)
        requests = make_requests(num_requests, config.vocab_size, num_tokens)
        limits = {"max_num_sequences": 64, "max_batched_tokens": 4096, "max_model_len": 2048, "kv_cache_bytes": 6 << 30}
        cells = [
            *standard_cells((3, 17, num_requests), (97, 512)),
            Cell("prompt lookup", num_requests, {"speculation": {"method": "ngram", "ngram_min": 1}}),
            Cell("prompt lookup, one by one", 1, {"speculation": {"method": "ngram", "ngram_min": 1}}),
        ]
        count, mismatches = compare(Exactness(model, ops, requests, **limits), cells)
        for mismatch in mismatches[:20]:
            print("DIFFERS", mismatch, flush=True)
        params = {"model": name, "requests": num_requests, "tokens": num_tokens}
        append("cells", count, "cells", params)
        append("mismatches", len(mismatches), "requests", params)
        del model
        torch.cuda.empty_cache()
