"""The engine at whatever shapes a peer was measured with: other batches, long contexts, other prompts.

    peer.py --all-graphs --batches 2,4,8,16,64,96,128,160,192 --prefill 64x256 --out F    (its own list of graph sizes)
    peer.py --all-graphs --batches 1,8,32 --prompt 3000 --gen 64 --prefill 8x3000 --out F
    peer.py --all-graphs --batches 1,4 --prompt 7000 --gen 64 --prefill 1x8000 --out F
    python -m benchmarks.gpu engine-shapes --peer F

One machine, the same prompts, formulas and numbers of rounds; the file may hold several runs of the peer.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.engine import EngineBench, make_bench
from benchmarks.gpu.figures import Shape, peer_shapes
from benchmarks.gpu.random_model import LLAMA_8B, LLAMA_8B_FP8
from benchmarks.gpu.record_engine import Append, appender


def record_shape(bench: EngineBench, shape: Shape, append: Append) -> float:
    """Our speed over the peer's, above 1 is faster."""
    if shape.out_tokens == 1:
        ours = bench.prefill_tokens_per_s(shape.batch, shape.prompt_tokens)
        params = {"prompts": shape.batch, "tokens": shape.prompt_tokens}
        append("prefill_tok_s", ours, "tok/s", params)
        ratio = ours / shape.figure
        append("prefill_ratio_vs_vllm", ratio, "x", {**params, "vllm_tok_s": shape.figure})
        return ratio
    ours = bench.decode_ms(shape.batch, shape.prompt_tokens, shape.out_tokens)
    params = {"batch": shape.batch, "context": shape.prompt_tokens + shape.out_tokens // 2}
    append("decode_ms", ours, "ms", params)
    ratio = shape.figure / ours
    append("decode_ratio_vs_vllm", ratio, "x", {**params, "vllm_ms": shape.figure})
    return ratio


def record_shapes(out: Path, peer_file: Path, *, has_fp8: bool) -> None:
    """`ValueError` if the peer's file has nothing to compare with."""
    shapes = peer_shapes(peer_file, "fp8" if has_fp8 else None)
    if not shapes:
        raise ValueError(f"{peer_file} has no prefill and no decode of the peer's {'FP8' if has_fp8 else 'bf16'} mode")
    append = appender("fp8" if has_fp8 else "engine_8b", out)
    bench = make_bench(LLAMA_8B_FP8 if has_fp8 else LLAMA_8B)
    ratios = [(record_shape(bench, shape, append), shape) for shape in shapes]
    slowest, shape = min(ratios, key=lambda each: each[0])
    print(f"{len(ratios)} shapes, slowest {slowest:.3f}x at {shape.batch} x {shape.prompt_tokens} + {shape.out_tokens}")
