"""What the launches of a step with prompts cost the host, operation by operation, on a GPU.

python -m benchmarks.gpu.host_launch [--rows 512 1408] [--model llama-fp8] [--profile]

The layers of a few-layer model run eagerly on a step of padding, which launches what any step of its shape does;
the device is idle when a step begins and its queue never fills, so the host waits for nothing. `--profile` adds
the functions that took most of the host's time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from benchmarks.gpu.random_model import random_decoder
from benchmarks.gpu.record_exactness import MODELS
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.gpu.shapes import MANY_ROWS, StepShape
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.ops import Ops
from cluster.engine.kv_cache import KVCache

NUM_LAYERS, SEQUENCES, ROUNDS, BLOCK_SIZE = 4, 256, 20, 64
PROFILED_LINES = 25


@contextmanager
def timed_operations(ops: Any) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of an operation that a model made, by the operation's name."""
    calls: dict[str, list[float]] = defaultdict(list)
    depth = [0]  # an operation that calls another one is one

    def timed(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            depth[0] += 1
            start = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    calls[name].append(time.perf_counter() - start)

        return run

    names = [name for name in vars(Ops) if not name.startswith("_") and callable(getattr(ops, name, None))]
    for name in names:
        setattr(ops, name, timed(name, getattr(ops, name)))
    try:
        yield calls
    finally:
        for name in names:
            delattr(ops, name)


def host_ms(forward: Callable[[], object], rounds: int, synchronize: Callable[[], object]) -> float:
    """Least milliseconds until a call of `forward` returns, the device having been idle before."""
    best_s = float("inf")
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        forward()
        best_s = min(best_s, time.perf_counter() - start)
    synchronize()
    return 1e3 * best_s


def print_step(
    runner: GpuModelRunner, ops: Any, shape: StepShape, num_layers: int, synchronize: Callable[[], object]
) -> None:
    """One line for the layers, one for each operation in them."""
    bounds = runner._bounds(shape)

    def forward() -> object:
        return runner._hidden(shape, *bounds)

    with torch.inference_mode():
        runner._stage_padding()
        forward()
        milliseconds = host_ms(forward, ROUNDS, synchronize)
        with timed_operations(ops) as calls:
            host_ms(forward, ROUNDS, synchronize)
    print(f"\n{shape.num_rows} rows of {shape.num_sequences} sequences: {milliseconds / num_layers:.3f} ms a layer")
    for name, seconds in sorted(calls.items(), key=lambda item: -sum(item[1])):
        each_us, count = 1e6 * sorted(seconds)[len(seconds) // 2], len(seconds) / ROUNDS / num_layers
        print(f"  {name:20} {each_us:8.1f} us, {count:5.2f} times a layer", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1408])
    parser.add_argument("--model", choices=tuple(MODELS), default="llama")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    config = msgspec.structs.replace(MODELS[options.model][1], num_layers=NUM_LAYERS)
    ops = CudaOps(torch.device("cuda"))
    model = random_decoder(config, ops)
    cache = KVCache(model.kv_layout(BLOCK_SIZE), 512, ops.device)
    runner = GpuModelRunner(
        model, ops, cache, device=ops.device, max_batched_tokens=max(*options.rows, SEQUENCES),
        max_num_sequences=SEQUENCES, max_model_len=8192, use_graphs=False,
    )  # fmt: skip
    for rows in options.rows:
        shape = StepShape(rows, min(SEQUENCES, rows), 1, MANY_ROWS, has_many_splits=True)
        print_step(runner, ops, shape, NUM_LAYERS, torch.cuda.synchronize)
        if options.profile:
            print_profile(lambda shape=shape: runner._hidden(shape, *runner._bounds(shape)))  # type: ignore[misc]


def print_profile(forward: Callable[[], object]) -> None:
    """The functions that took most of the host's own time."""
    torch.cuda.synchronize()
    with torch.inference_mode(), cProfile.Profile() as profile:
        for _ in range(ROUNDS):
            forward()
            torch.cuda.synchronize()
    pstats.Stats(profile).sort_stats("tottime").print_stats(PROFILED_LINES)


if __name__ == "__main__":
    main()
