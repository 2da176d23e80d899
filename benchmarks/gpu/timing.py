"""Timing on a CUDA device: one graph over rotating inputs, median of replays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch


def graph_ms(calls: Sequence[Callable[[], object]], *, min_ms: float = 4.0, replays: int = 5) -> float:
    """Median milliseconds of one call. `calls` do the same on different inputs, so that L2 stays cold."""
    graph = capture(calls)
    once = replay_ms(graph)
    rounds = max(1, min(200, round(min_ms / max(once, 1e-3))))
    times = [_timed(_repeat(graph, rounds)) / (rounds * len(calls)) for _ in range(replays)]
    return sorted(times)[len(times) // 2]


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. They run once before, which compiles kernels and sizes workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _repeat(graph: torch.cuda.CUDAGraph, count: int) -> Callable[[], object]:
    def replay() -> None:
        for _ in range(count):
            graph.replay()

    return replay


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay, after another one."""
    graph.replay()
    return _timed(graph.replay)


def shuffled_rounds(count: int, rounds: int) -> Iterator[list[int]]:
    """Whose turn it is, round by round. Where power limits a card, its clock swings within tens of milliseconds: in a
    fixed order the same ones could compute at the high clocks each time."""
    generator = random.Random(0)
    order = list(range(count))
    for _ in range(rounds):
        generator.shuffle(order)
        yield list(order)


def interleaved_ms(
    variants: Sequence[Sequence[Callable[[], object]]], *, rounds: int = 7, min_ms: float = 1.5
) -> list[list[float]]:
    """Milliseconds of one call, per variant and round, the variants taking turns in an order of each round's own.

    Clocks and temperature drift over a second of load; turns of milliseconds give every variant the same share. The
    device has work throughout a round: no turn waits for the host.
    """
    graphs = [capture(calls) for calls in variants]
    counts = [max(1, round(min_ms / max(replay_ms(graph), 1e-3))) for graph in graphs]
    times: list[list[float]] = [[] for _ in variants]
    for index, order in enumerate(shuffled_rounds(len(graphs), rounds + 1)):
        graphs[order[-1]].replay()  # or the first turn would begin with a launch
        marks = [recorded()]
        for each in order:
            for _ in range(counts[each]):
                graphs[each].replay()
            marks.append(recorded())
        marks[-1].synchronize()
        for each, (start, end) in zip(order, pairwise(marks), strict=True):
            if index:  # the first round warms up
                times[each].append(float(start.elapsed_time(end)) / (counts[each] * len(variants[each])))
    return times


def recorded() -> torch.cuda.Event:
    """An event of the current stream, here."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _timed(call: Callable[[], object]) -> float:
    start = recorded()
    call()
    end = recorded()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth_tb_s(num_bytes: int = 1 << 32) -> float:
    """Device-to-device copy by kernels, bytes read plus bytes written, in TB/s; median of 9."""
    source = torch.randn(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = sorted(_timed(lambda: [target.copy_(source) for _ in range(4)]) / 4 for _ in range(9))
    return 2 * num_bytes / times[4] / 1e9
