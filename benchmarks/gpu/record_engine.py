"""The published figures of the whole engine, beside a peer's from the same machine and hour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine import EngineBench, make_bench
from benchmarks.gpu.figures import Figures, peer_figures
from benchmarks.gpu.random_model import LLAMA_8B
from benchmarks.gpu.timing import copy_bandwidth_tb_s
from benchmarks.results import append_result

BATCHES = (1, 32, 256)
PEER_MIXED, PEER_PREFILL = 512, (16, 2048)
SHORT_PROMPTS, PEER_SHORT_PROMPT = (128, 512, 1024), 128  # tokens
PEER_SEQUENCES = 256  # `max_num_seqs` of the peer's script
Append = Callable[[str, float, str, dict[str, Any]], None]


def appender(benchmark: str, out: Path) -> Append:
    """Prints a figure and appends its record as soon as it is known."""

    def append(metric: str, value: float, unit: str, params: dict[str, Any]) -> None:
        print(f"{benchmark}.{metric} = {value:.4g} {unit} {params}", flush=True)
        append_result(benchmark, metric, value, unit, params, device=torch.cuda.get_device_name(), directory=out)

    return append


def record_prefill(bench: EngineBench, append: Append, peer: Figures) -> float:
    """Tokens a second."""
    count, length = PEER_PREFILL
    prefill = bench.prefill_tokens_per_s(count, length)
    append("prefill_tok_s", prefill, "tok/s", {"prompts": count, "tokens": length})
    if peer.prefill_tok_s is not None:
        append("prefill_ratio_vs_vllm", prefill / peer.prefill_tok_s, "x", {"vllm_tok_s": peer.prefill_tok_s})
    return prefill


def record_short_prompts(bench: EngineBench, append: Append, peer: Figures) -> None:
    """Time to the first token of a prompt that is alone."""
    for length in SHORT_PROMPTS:
        milliseconds = bench.prefill_ms(length)
        append("prefill_ms", milliseconds, "ms", {"batch": 1, "tokens": length})
        if length == PEER_SHORT_PROMPT and 1 in peer.one_token_ms:
            theirs = peer.one_token_ms[1]
            params = {"batch": 1, "tokens": length, "vllm_ms": theirs}
            append("ttft_ratio_vs_vllm", theirs / milliseconds, "x", params)


def record_decode(bench: EngineBench, batch: int, append: Append, peer: Figures) -> float:
    """Milliseconds of a step."""
    milliseconds = bench.decode_ms(batch)
    append("decode_ms", milliseconds, "ms", {"batch": batch, "context": 256})
    if batch in peer.decode_ms:
        theirs = peer.decode_ms[batch]
        append("decode_ratio_vs_vllm", theirs / milliseconds, "x", {"batch": batch, "vllm_ms": theirs})
    return milliseconds


def record_mixed(bench: EngineBench, append: Append, peer: Figures) -> None:
    """Tokens a second, prompts and answers together: with as many sequences at once as the peer's script allows,
    which is what is compared, and with our default."""
    mixed = bench.mixed(PEER_MIXED, at_once=PEER_SEQUENCES)
    params: dict[str, Any] = {"requests": PEER_MIXED, "max_num_sequences": PEER_SEQUENCES}
    append("mixed_tok_s", mixed.tokens_per_s, "tok/s", params)
    if peer.mixed_tok_s is not None:
        params = {"vllm_tok_s": peer.mixed_tok_s, "max_num_sequences": PEER_SEQUENCES}
        append("mixed_ratio_vs_vllm", mixed.tokens_per_s / peer.mixed_tok_s, "x", params)
    mixed = bench.mixed(PEER_MIXED, rounds=1)
    params = {"requests": PEER_MIXED, "max_num_sequences": bench.engine.scheduler.max_num_sequences}
    append("mixed_tok_s", mixed.tokens_per_s, "tok/s", params)


def record_engine(out: Path, peer_file: Path | None = None) -> None:
    """`engine_8b`: always invariant, greedy, random prompts, the peer's formulas."""
    append = appender("engine_8b", out)
    peer = peer_figures(peer_file)
    copy_tb_s = copy_bandwidth_tb_s()
    bench = make_bench()
    weights = bench.weight_bytes
    pool = bench.engine.num_blocks * bench.engine.layout.block_bytes
    record_prefill(bench, append, peer)
    record_short_prompts(bench, append, peer)
    for batch in BATCHES:
        milliseconds = record_decode(bench, batch, append, peer)
        if batch == 1:
            bytes_read = weights + 256 * bench.engine.layout.block_bytes // bench.engine.layout.block_size
            floor_ms = bytes_read / copy_tb_s / 1e9
            params = {"batch": 1, "copy_tb_s": round(copy_tb_s, 3)}
            append("roofline_fraction", floor_ms / milliseconds, "x", params)
    append("host_fraction", bench.host_fraction(256), "x", {"batch": 256})
    record_mixed(bench, append, peer)
    embedding = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 2
    others = (torch.cuda.max_memory_allocated() - weights - embedding - pool) / 2**30
    append("memory_beside_weights_and_pool_gib", others, "GiB", {"pool_gib": round(pool / 2**30, 2)})
    _record_more_shapes(bench, append)


def _record_more_shapes(bench: EngineBench, append: Append) -> None:
    """Not in the peer's table: long contexts, a few sequences, sampled with logprobs."""
    for batch, context in ((8, 128), (1, 7000), (32, 3000)):
        milliseconds = bench.decode_ms(batch, prompt=context, out=64, rounds=2)
        append("decode_ms", milliseconds, "ms", {"batch": batch, "context": context + 32})
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "logprobs": 1}
    milliseconds = bench.decode_ms(32, out=64, rounds=2, **sampled)
    append("decode_ms", milliseconds, "ms", {"batch": 32, "context": 160, **sampled})
