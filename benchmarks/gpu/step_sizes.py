"""What a decode step takes at each number of sequences that has a graph: `python -m benchmarks.gpu.step_sizes`.

A size that takes longer than a larger one has plans that are worth tuning (`tune_step`), or that were refused: those
are printed at the end. All operations of the 8B shape in one graph for each size, which take turns; no scheduler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.gpu.step import DecodeStep, decode_batch
from benchmarks.gpu.timing import interleaved_ms
from cluster.engine.gpu.shapes import padded_sizes
from cluster.engine.kernels.cuda_ops import CudaOps

CONTEXT = 256
_TURN_MS, _ROUNDS = 8.0, 15


def slower_than_larger(sizes: Sequence[int], milliseconds: Sequence[float]) -> list[int]:
    """Sizes, ascending, whose step takes longer than that of some larger size."""
    found = []
    for index, size in enumerate(sizes[:-1]):
        if milliseconds[index] > min(milliseconds[index + 1 :]):
            found.append(size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.step_sizes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="FP8 layers")
    parser.add_argument("--most", type=int, default=256, help="sequences")
    options = parser.parse_args()
    ops = CudaOps(torch.device("cuda"), residual_dtype=torch.bfloat16, pdl=True)
    step = DecodeStep(ops, has_fp8=options.fp8)
    sizes = padded_sizes(options.most)
    steps = [partial(step.run, *decode_batch(size, CONTEXT)) for size in sizes]
    times = interleaved_ms([[each] for each in steps], rounds=_ROUNDS, min_ms=_TURN_MS)
    milliseconds = [statistics.fmean(each) for each in times]
    for size, each in zip(sizes, milliseconds, strict=True):
        print(f"{size:4} sequences  {each:7.3f} ms", flush=True)
    print("longer than a larger size:", slower_than_larger(sizes, milliseconds) or "none")
    for refusal in ops.admission.refusals:
        print("refused:", refusal)


if __name__ == "__main__":
    main()
