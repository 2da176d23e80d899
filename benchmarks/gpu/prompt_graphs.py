"""Graphs for steps with prompts, on and off: the mixed load and short prompts, one engine after the other.

python -m benchmarks.gpu engine-profile --only mixed --graph-prompt-rows 0 1536 [--requests 512]

A value may be given again, to see what the machine itself changes meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.engine import EngineBench, mixed_workload
from benchmarks.gpu.step_log import StepLog, StepMeans
from cluster.engine.gpu.prompt_graphs import GraphCosts
from cluster.engine.gpu.runner import GpuModelRunner

WARM_UP_REQUESTS, WARM_UP_TOKENS = 32, 32
MOST_SEQUENCES = 256  # at once: as the published figure of the mixed load has it
SHORT_PROMPTS = (128, 512, 1024)  # tokens


@dataclass(frozen=True)
class Side:
    """An engine with one value of `graph_prompt_rows`."""

    graph_prompt_rows: int
    start_s: float
    costs: GraphCosts | None
    num_blocks: int
    tokens_per_s: float
    mixed: StepMeans
    idle_share: float
    first_token_ms: tuple[float, ...]  # of SHORT_PROMPTS, each alone

    def print(self) -> None:
        mixed = self.mixed
        prompts = ", ".join(
            f"{length}: {each:.2f} ms" for length, each in zip(SHORT_PROMPTS, self.first_token_ms, strict=False)
        )
        print(f"\ngraph_prompt_rows {self.graph_prompt_rows}: ready after {self.start_s:.1f} s; graphs: ", end="")
        print(self.costs or "none")
        print(f"  KV pool of {self.num_blocks} blocks; mixed {self.tokens_per_s:.0f} tokens/s, without the log")
        print(
            f"  {mixed.count} mixed steps, {mixed.num_graphs} of them graphs: {mixed.step_ms:.2f} ms, "
            f"device {mixed.device_ms:.2f} ms, host {mixed.host_ms:.2f} ms (its launch {mixed.launch_ms:.2f}, "
            f"and {mixed.wait_ms:.2f} waiting)"
        )
        print(f"  device idle {self.idle_share:.2%} of the run; first token of prompts of {prompts}", flush=True)


def measure(
    make: Callable[[int], EngineBench], graph_prompt_rows: int, num_requests: int, prompts: Sequence[int]
) -> Side:
    """`prompts`: lengths whose time to the first token is measured."""
    start = time.perf_counter()
    bench = make(graph_prompt_rows)
    start_s = time.perf_counter() - start
    runner = bench.engine._runner
    assert isinstance(runner, GpuModelRunner)
    scheduler = bench.engine.scheduler
    scheduler.max_num_sequences = min(scheduler.max_num_sequences, MOST_SEQUENCES)
    warm_up = mixed_workload(min(num_requests, WARM_UP_REQUESTS))
    bench.run(warm_up.prompts, [min(count, WARM_UP_TOKENS) for count in warm_up.num_tokens])
    first_token_ms = tuple(bench.prefill_ms(length) for length in prompts)
    mixed = bench.mixed(num_requests, rounds=1)
    workload = mixed_workload(num_requests)
    with StepLog(bench.engine) as log:
        bench.run(workload.prompts, workload.num_tokens)
    log.print_classes()
    costs = None if runner.prompt_graphs is None else runner.prompt_graphs.costs
    return Side(
        graph_prompt_rows, start_s, costs, bench.engine.num_blocks, mixed.tokens_per_s, log.means(is_decode=False),
        log.idle_share, first_token_ms,
    )  # fmt: skip


def compare_prompt_graphs(make: Callable[[int], EngineBench], values: Sequence[int], num_requests: int) -> list[Side]:
    """`make`: an engine with that value of `graph_prompt_rows`, over the same weights for all."""
    sides = []
    for value in values:
        print(f"\nmixed, {num_requests} requests, graph_prompt_rows {value}", flush=True)
        sides.append(measure(make, value, num_requests, SHORT_PROMPTS))
        gc.collect()  # an engine that waits for the collector would leave no room for the next one's pool
        torch.cuda.empty_cache()
    for side in sides:
        side.print()
    first = sides[0]
    for side in sides[1:]:
        print(
            f"graph_prompt_rows {side.graph_prompt_rows} : {first.graph_prompt_rows} = "
            f"{side.tokens_per_s / first.tokens_per_s:.3f} of the tokens/s",
            flush=True,
        )
    return sides
