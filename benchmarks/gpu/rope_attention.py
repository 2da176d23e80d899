"""Decode steps whose attention rotates and stores the new row (`AttentionPlan.split_rope_up_to`) against steps that do
it in a kernel of its own: `python -m benchmarks.gpu.rope_attention [--fp8]`.

The same weights and prompts, one engine after the other, each side twice, so that the machine's own drift shows.
Answers must be equal token by token.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu.engine import EngineBench, Workload, random_prompt
from benchmarks.gpu.random_model import LLAMA_8B, LLAMA_8B_FP8, random_decoder
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.models.llama import DecoderModel
from cluster.types import TokenChunk

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
SIDES = (False, True, True, False)
COMPARED_PROMPTS, COMPARED_TOKENS = 48, 40


class Side(NamedTuple):
    takes_rope: bool
    decode_ms: list[float]  # of BATCHES
    answers: dict[str, list[int]]
    refusals: list[str]


def answers(bench: EngineBench) -> dict[str, list[int]]:
    """Of prompts of many lengths, around the ends of blocks and splits."""
    prompts = [random_prompt(2 + 37 * index, 3000 + index) for index in range(COMPARED_PROMPTS)]
    request_ids = bench.add(Workload(prompts, [COMPARED_TOKENS] * COMPARED_PROMPTS))
    found: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
    while bench.engine.has_work():
        for event in bench.engine.step():
            assert isinstance(event, TokenChunk)
            found[event.request_id].extend(event.token_ids)
    return found


def measure(model: DecoderModel, ops: CudaOps, *, takes_rope: bool) -> Side:
    up_to = max(BATCHES) if takes_rope else 0
    ops.plans.attention = msgspec.structs.replace(ops.plans.attention, split_rope_up_to=up_to)
    bench = EngineBench(model, ops, gpu_memory_fraction=0.6)  # captures its graphs with these plans
    tokens = answers(bench)
    milliseconds = [bench.decode_ms(batch, rounds=2) for batch in BATCHES]
    side = Side(takes_rope, milliseconds, tokens, ops.admission.refusals)
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    print("one kernel " if takes_rope else "two kernels", " ".join(f"{each:.3f}" for each in milliseconds), flush=True)
    return side


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.rope_attention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="FP8 layers")
    options = parser.parse_args()
    ops = CudaOps(torch.device("cuda"))
    model = random_decoder(LLAMA_8B_FP8 if options.fp8 else LLAMA_8B, ops)
    print("            ms of a step at batch", *BATCHES)
    sides = [measure(model, ops, takes_rope=takes_rope) for takes_rope in SIDES]
    first, *others = (list(side.answers.values()) for side in sides)
    are_equal = all(other == first for other in others)
    print("answers equal:", are_equal)
    for index, batch in enumerate(BATCHES):
        one, two = (
            statistics.fmean(side.decode_ms[index] for side in sides if side.takes_rope is takes_rope)
            for takes_rope in (True, False)
        )
        print(f"batch {batch}: {two:.3f} -> {one:.3f} ms ({one / two:.3f})")
    for refusal in dict.fromkeys(refusal for side in sides for refusal in side.refusals):
        print(refusal)
    return 0 if are_equal else 1


if __name__ == "__main__":
    sys.exit(main())
