"""CPU kernels beside torch's own on the shapes of SmolLM2-135M: `python -m benchmarks.cpu_kernels`.

One run measures both, in turns, on the same data. Weights are rotated through more memory than the L2
cache holds, as in a forward pass. Prints a table; with `--record` it also appends the results to
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.results import append_result
from cluster.engine.kernels import AttentionMetadata, Ops, get_ops
from cluster.engine.kernels.cpu.library import cpu_model

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN, VOCAB = 576, 9, 3, 64, 1536, 49152
LAYERS = {"qkv": ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
BLOCK_SIZE = 32
ROTATED_BYTES = 32 << 20


class Measured(msgspec.Struct, frozen=True):
    name: str
    rows: int
    ours_us: float
    torch_us: float

    @property
    def ratio(self) -> float:
        """Our speed in units of torch's."""
        return self.torch_us / self.ours_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    arguments = parser.parse_args()
    ops = get_ops("cpu", arguments.threads)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{cpu_model()}, {ops.name}, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"{'kernel':<22}{'rows':>6}{'ours µs':>12}{'torch µs':>12}{'ratio':>8}")
    results = []
    for measured in measurements(ops, arguments.seconds):
        print(
            f"{measured.name:<22}{measured.rows:>6}{measured.ours_us:>12.1f}{measured.torch_us:>12.1f}{measured.ratio:>8.2f}"
        )
        results.append(measured)
    if arguments.record:
        print(f"appended to {record(results, ops.name)}")


def measurements(ops: Ops, seconds: float) -> list[Measured]:
    results = [
        measure_linear(ops, name, outputs, inputs, rows, seconds)
        for name, (outputs, inputs) in LAYERS.items()
        for rows in (1, 16, 64, 512)
    ]
    results.append(measure_linear(ops, "lm_head", VOCAB, HIDDEN, 1, seconds))
    results.append(measure_linear(ops, "lm_head", VOCAB, HIDDEN, 16, seconds))
    results += [measure_attention(ops, rows, 512, seconds) for rows in (1, 64, 512)]
    results.append(measure_attention(ops, 1, 4096, seconds))
    results.append(measure_norm(ops, 1, seconds))
    results.append(measure_norm(ops, 512, seconds))
    return results


def measure_linear(ops: Ops, name: str, outputs: int, inputs: int, rows: int, seconds: float) -> Measured:
    copies = max(1, ROTATED_BYTES // (outputs * inputs * 2))
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(copies)]
    packed = [ops.pack_linear(weight) for weight in weights]
    x = torch.randn(rows, inputs).bfloat16()
    ours, theirs = in_turns(
        lambda i: ops.linear(x, packed[i % copies]), lambda i: linear(x, weights[i % copies]), seconds
    )
    return Measured(name, rows, ours, theirs)


def measure_attention(ops: Ops, rows: int, context: int, seconds: float) -> Measured:
    num_blocks = context // BLOCK_SIZE
    kv_N2GSD = torch.randn(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE).bfloat16()
    q_THD = torch.randn(rows, HEADS, HEAD_SIZE).bfloat16()
    positions = torch.arange(context - rows, context)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_len=torch.tensor([context], dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping=positions,
        positions=positions,
        num_rows_max=rows,
        context_len_max=context,
    )
    keys, values = kv_N2GSD.permute(1, 2, 0, 3, 4).reshape(2, 1, KV_HEADS, context, HEAD_SIZE)
    q = q_THD.transpose(0, 1)[None]
    mask = None if rows in (1, context) else torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
    ours, theirs = in_turns(
        lambda _: ops.attention(q_THD, kv_N2GSD, metadata, 0.125),
        lambda _: scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=rows == context, enable_gqa=True
        ),
        seconds,
    )
    return Measured(f"attention over {context}", rows, ours, theirs)


def measure_norm(ops: Ops, rows: int, seconds: float) -> Measured:
    x, update = torch.randn(rows, HIDDEN), torch.zeros(rows, HIDDEN).bfloat16()
    weight = torch.ones(HIDDEN).bfloat16()
    residual = x.bfloat16()
    ours, theirs = in_turns(
        lambda _: ops.add_rms_norm(x, update, weight, 1e-5),
        lambda _: torch.nn.functional.rms_norm(residual + update, (HIDDEN,), weight, 1e-5),
        seconds,
    )
    return Measured("add_rms_norm", rows, ours, theirs)


def in_turns(ours: Callable[[int], object], theirs: Callable[[int], object], seconds: float) -> tuple[float, float]:
    """Lower quartiles in microseconds of two functions, each run for about `seconds`, in short turns."""
    times: tuple[list[float], list[float]] = ([], [])
    ours(0), theirs(0)
    end = time.perf_counter() + 2 * seconds
    calls = 0
    while time.perf_counter() < end or calls < 20:
        for function, log in ((ours, times[0]), (theirs, times[1])):
            for _ in range(5):
                start = time.perf_counter()
                function(calls)
                log.append(time.perf_counter() - start)
                calls += 1
    return statistics.quantiles(times[0])[0] * 1e6, statistics.quantiles(times[1])[0] * 1e6


def record(results: list[Measured], ops_name: str) -> Path:
    """Append all results to today's file under `benchmarks/results`."""
    for result in results:
        path = append_result(
            "cpu_kernels",
            "speed_ratio_vs_torch",
            round(result.ratio, 3),
            "x",
            {
                "kernel": result.name,
                "rows": result.rows,
                "ours_us": round(result.ours_us, 1),
                "torch_us": round(result.torch_us, 1),
                "ops": ops_name,
            },
        )
    return path


if __name__ == "__main__":
    main()
