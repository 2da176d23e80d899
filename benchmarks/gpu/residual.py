"""What a residual stream in fp32 costs (`model.residual_dtype`), by the width of a model:
`python -m benchmarks.gpu.residual [--shape llama-8b ...]`.

The whole engine with random weights, bf16, fp32, fp32, bf16, so that the machine's own drift shows. Recorded is time in
fp32 ÷ time in bf16, of the better one of each. All shapes have the vocabulary of Llama 3.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu.engine import make_bench
from benchmarks.gpu.random_model import LLAMA_8B
from benchmarks.results import RESULTS_DIRECTORY, append_result
from cluster.engine.models.config import ModelConfig, NoScaling

BATCHES = (1, 32, 256)
SIDES = (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
_NARROW = msgspec.structs.replace(LLAMA_8B, rope_scaling=NoScaling(), max_position=8192)
SHAPES = {
    "llama-8b": LLAMA_8B,
    "width-2048": msgspec.structs.replace(
        _NARROW, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_size=64, ffn_size=8192
    ),
    "width-1024": msgspec.structs.replace(
        _NARROW, hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, ffn_size=3072
    ),
    "width-576": msgspec.structs.replace(
        _NARROW, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_size=64, ffn_size=1536
    ),
}


class Side(NamedTuple):
    decode_ms: tuple[float, ...]  # of BATCHES
    prefill_ms: float  # of 16 prompts of 2,048 tokens


def measure(shape: ModelConfig, residual_dtype: torch.dtype) -> Side:
    bench = make_bench(shape, residual_dtype=residual_dtype, gpu_memory_fraction=0.6)
    decode = tuple(bench.decode_ms(batch) for batch in BATCHES)
    prefill = 1e3 * 16 * 2048 / bench.prefill_tokens_per_s()
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    steps = " ".join(f"{each:7.3f}" for each in decode)
    print(f"{residual_dtype!s:15} {steps}   prefill {prefill:7.1f} ms", flush=True)
    return Side(decode, prefill)


def best(sides: list[Side]) -> Side:
    decode = zip(*(side.decode_ms for side in sides), strict=True)
    return Side(tuple(map(min, decode)), min(side.prefill_ms for side in sides))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.residual", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS_DIRECTORY, help="a directory")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    for name in options.shape:
        print(f"{name}: decode steps of {BATCHES} sequences, ms", flush=True)
        sides = [(dtype, measure(SHAPES[name], dtype)) for dtype in SIDES]
        narrow, wide = (best([side for dtype, side in sides if dtype is which]) for which in SIDES[:2])
        figures = [
            ("decode_ratio_fp32", {"shape": name, "batch": batch, "bf16_ms": round(before, 4)}, after / before)
            for batch, before, after in zip(BATCHES, narrow.decode_ms, wide.decode_ms, strict=True)
        ]
        prefill = {"shape": name, "prompts": 16, "tokens": 2048, "bf16_ms": round(narrow.prefill_ms, 2)}
        figures.append(("prefill_ratio_fp32", prefill, wide.prefill_ms / narrow.prefill_ms))
        for metric, params, value in figures:
            print(f"{metric:20} {value:.3f} x  {params}", flush=True)
            append_result("residual", metric, round(value, 4), "x", params, device=device, directory=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
