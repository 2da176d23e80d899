"""`fp8`: the whole engine with FP8 layers on an 8B shape, beside a peer's FP8 and our own bf16."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from benchmarks.gpu.engine import make_bench
from benchmarks.gpu.figures import Figures, peer_figures, recorded_figures
from benchmarks.gpu.random_model import LLAMA_8B_FP8
from benchmarks.gpu.record_engine import BATCHES, PEER_PREFILL, appender, record_decode, record_mixed, record_prefill


def record_engine_fp8(out: Path, peer_file: Path | None, ours_file: Path | None) -> None:
    """Random weights, quantised as a loader quantises bf16: a scale per output row, and one per token.

    `ours_file`: `engine_8b` records of this device. Without it our bf16 is measured here, last.
    """
    append = appender("fp8", out)
    peer = peer_figures(peer_file, quantization="fp8")
    bf16 = None if ours_file is None else recorded_figures(ours_file, torch.cuda.get_device_name())
    bench = make_bench(LLAMA_8B_FP8)
    ours = Figures(prefill_tok_s=record_prefill(bench, append, peer))
    for batch in BATCHES:
        ours.decode_ms[batch] = record_decode(bench, batch, append, peer)
    record_mixed(bench, append, peer)
    if bf16 is None:
        del bench
        gc.collect()  # an engine and what it gave its runner know each other
        torch.cuda.empty_cache()
        bf16 = _measure_bf16()
    assert ours.prefill_tok_s is not None
    if bf16.prefill_tok_s is not None:
        append("prefill_speedup", ours.prefill_tok_s / bf16.prefill_tok_s, "x", {"bf16_tok_s": bf16.prefill_tok_s})
    for batch, milliseconds in bf16.decode_ms.items():
        if batch in ours.decode_ms:
            params = {"batch": batch, "bf16_ms": milliseconds}
            append("decode_speedup", milliseconds / ours.decode_ms[batch], "x", params)


def _measure_bf16() -> Figures:
    bench = make_bench()
    figures = Figures(prefill_tok_s=bench.prefill_tokens_per_s(*PEER_PREFILL))
    for batch in BATCHES:
        figures.decode_ms[batch] = bench.decode_ms(batch)
    print("bf16:", figures, flush=True)
    return figures
