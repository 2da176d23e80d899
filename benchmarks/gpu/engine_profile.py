"""Where an engine's time goes: its steps by class, the device between them, the kernels of a few.

python -m benchmarks.gpu engine-profile [--only prefill|decode|mixed] [--requests 512] [--model llama-fp8]
python -m benchmarks.gpu engine-profile --only mixed --graph-prompt-rows 0 1536
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engine import EngineBench, Workload, bench_maker, make_bench, mixed_workload, random_prompt
from benchmarks.gpu.prompt_graphs import compare_prompt_graphs
from benchmarks.gpu.random_model import LLAMA_8B, LLAMA_8B_FP8
from benchmarks.gpu.step_log import StepLog
from cluster.engine.engine import Engine
from cluster.engine.models.config import ModelConfig

MIXED_WINDOW = range(120, 132)  # all places are taken by then, and prompts follow those that end
MOST_KERNELS = 12


def print_kernels(bench: EngineBench, workload: Workload, window: range) -> None:
    """Kernel time by name in a window of the steps of a workload, which is then broken off."""
    engine = bench.engine
    request_ids = bench.add(workload)
    with StepLog(engine) as log:
        _step(engine, window.start)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            start = time.perf_counter()
            _step(engine, len(window))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        for request_id in request_ids:
            engine.cancel(request_id, 0)
        while engine.has_work():
            engine.step()
    totals = [(each.self_device_time_total / 1e3, each.count, each.key) for each in profiled.key_averages()]
    totals = sorted((each for each in totals if each[0] > 0), reverse=True)
    all_ms = sum(milliseconds for milliseconds, _, _ in totals)
    print(f"{len(window)} steps, {1e3 * seconds:.1f} ms under the profiler, {all_ms:.2f} ms in {len(totals)} kernels")
    log.print_steps(range(window.start, min(window.stop, len(log.records))))
    for milliseconds, count, name in totals[:MOST_KERNELS]:
        print(f"  {milliseconds:9.3f} ms {milliseconds / all_ms:6.1%} {count:6} x  {name[:110]}")
    print(flush=True)


def _step(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def _logged(bench: EngineBench, workload: Workload) -> StepLog:
    with StepLog(bench.engine) as log:
        bench.run(workload.prompts, workload.num_tokens)
    return log


def _same(count: int, length: int, num_tokens: int, seed: int) -> Workload:
    return Workload([random_prompt(length, seed + i) for i in range(count)], [num_tokens] * count)


def profile_prefill(bench: EngineBench) -> None:
    """16 prompts of 2,048 tokens, then the kernels of one step of 8,192 rows."""
    workload = _same(16, 2048, 1, 1000)
    bench.run(workload.prompts, workload.num_tokens)
    print("\nprefill, 16 x 2048")
    log = _logged(bench, workload)
    log.print_classes()
    log.print_steps(range(len(log.records)))
    print("\nkernels of one step of prefill, 4 x 2048")
    print_kernels(bench, _same(4, 2048, 1, 1000), range(1))


def profile_decode(bench: EngineBench) -> None:
    """256 sequences, then the kernels of eight of their steps."""
    workload = _same(256, 128, 128, 5000)
    bench.run(workload.prompts, [8] * 256)
    print("\ndecode, 256 x 128 tokens")
    _logged(bench, workload).print_classes()
    print("\nkernels of decode, 256 sequences of about 200 tokens")
    print_kernels(bench, workload, range(80, 88))


def profile_mixed(bench: EngineBench, count: int) -> None:
    """The mixed workload, then the kernels of some of its steps."""
    workload = mixed_workload(count)
    warm_up = mixed_workload(min(count, 32))
    bench.run(warm_up.prompts, [32] * len(warm_up.prompts))
    print(f"\nmixed, {count} requests")
    log = _logged(bench, workload)
    log.print_classes()
    tokens = sum(map(len, workload.prompts)) + sum(workload.num_tokens)
    print(f"{tokens / (log.ended_at - log.started_at):.0f} tokens/s under the log", flush=True)
    window = MIXED_WINDOW if len(log.records) > MIXED_WINDOW.stop else range(2, len(log.records) // 2)
    print("\nkernels of the mixed workload")
    print_kernels(bench, workload, window)


def compare_graphs(values: Sequence[int], num_requests: int, *, has_fp8: bool) -> None:
    """The mixed workload with each value of `graph_prompt_rows`."""
    start = time.perf_counter()
    make = bench_maker(_shape(has_fp8=has_fp8))
    compare_prompt_graphs(lambda value: make(graph_prompt_rows=value), values, num_requests)
    print(f"{time.perf_counter() - start:.0f} s in all")


def _shape(*, has_fp8: bool) -> ModelConfig:
    return LLAMA_8B_FP8 if has_fp8 else LLAMA_8B


def profile_engine(only: str | None, num_requests: int, *, has_fp8: bool) -> None:
    """All, or the one that is named."""
    start = time.perf_counter()
    bench = make_bench(_shape(has_fp8=has_fp8))
    print(f"engine: {bench.engine.num_blocks} blocks, ready after {time.perf_counter() - start:.1f} s", flush=True)
    if only in (None, "prefill"):
        profile_prefill(bench)
    if only in (None, "decode"):
        profile_decode(bench)
    if only in (None, "mixed"):
        profile_mixed(bench, num_requests)
    print(f"{time.perf_counter() - start:.0f} s in all")
