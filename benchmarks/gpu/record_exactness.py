"""`exactness_gpu`: large shapes, each request alone against every other way to compute it, bit for bit."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.gpu.exactness import Cell, Exactness, compare, crowded_cells, make_requests, standard_cells
from benchmarks.gpu.random_model import DEEPSEEK_V2_LITE, LLAMA_8B, LLAMA_8B_FP8, QWEN3_30B_A3B, random_decoder
from benchmarks.gpu.record_engine import appender
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.models.config import ModelConfig

MODELS: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("llama 8B", LLAMA_8B),
    "qwen3-moe": ("qwen3 30B A3B, 6 layers", msgspec.structs.replace(QWEN3_30B_A3B, num_layers=6)),
    "deepseek": ("deepseek V2 Lite, 4 layers", msgspec.structs.replace(DEEPSEEK_V2_LITE, num_layers=4)),
    "llama-fp8": ("llama 8B FP8, 8 layers", msgspec.structs.replace(LLAMA_8B_FP8, num_layers=8)),
}
NUM_REQUESTS, NUM_TOKENS = 48, 8
LIMITS = {"max_num_sequences": 64, "max_batched_tokens": 4096, "max_model_len": 2048, "kv_cache_bytes": 6 << 30}
_DRAFTS = {"speculation": {"method": "ngram", "ngram_min": 1}}
CELLS = (
    *standard_cells((3, 17, NUM_REQUESTS), (97, 512)),
    Cell("prompt lookup", NUM_REQUESTS, _DRAFTS),
    Cell("prompt lookup, one by one", 1, _DRAFTS),
    *crowded_cells(NUM_REQUESTS, (64, 128, 192, 256), {"max_num_sequences": 256, "kv_cache_bytes": 8 << 30}),
)
_QUICK = (
    *(f"batch {NUM_REQUESTS}, graphs", "batch 17, graphs", "prompts in graphs, chunks of 97"),
    *("chunks of 97", "split, warm cache", "prompt lookup", "among 256, graphs"),
)


def chosen_cells(*, quick: bool) -> list[Cell]:
    """All, or seven that differ most from each other."""
    return [cell for cell in CELLS if cell.name in _QUICK] if quick else list(CELLS)


def record_exactness(out: Path, names: Sequence[str], *, quick: bool = False, budget_s: float = math.inf) -> None:
    """`budget_s`: no cell of a model is begun later, counted from the model's start; `cells` says how many were."""
    append = appender("exactness_gpu", out)
    for name in names:
        title, config = MODELS[name]
        deadline_s = time.monotonic() + budget_s
        ops = CudaOps(torch.device("cuda"))
        model = random_decoder(config, ops, max_position=4096)
        requests = make_requests(NUM_REQUESTS, config.vocab_size, NUM_TOKENS)
        count, mismatches = compare(Exactness(model, ops, requests, **LIMITS), chosen_cells(quick=quick), deadline_s)
        for mismatch in mismatches[:20]:
            print("DIFFERS", mismatch, flush=True)
        params = {"model": title, "requests": NUM_REQUESTS, "tokens": NUM_TOKENS}
        append("cells", count, "cells", params)
        append("mismatches", len(mismatches), "requests", params)
        del model
        gc.collect()
        torch.cuda.empty_cache()
