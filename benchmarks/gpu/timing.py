"""Timing on a CUDA device: one graph over rotating inputs, median of replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def interleaved_ms(
    variants: Sequence[Sequence[Callable[[], object]]], *, rounds: int = 7, min_ms: float = 1.5
) -> list[list[float]]:
    """Milliseconds of one call, per variant and round, the variants taking turns.

    Clocks and temperature drift over a second of load; turns of milliseconds give every variant the same share.
    """
    graphs = [capture(calls) for calls in variants]
    counts = [max(1, round(min_ms / max(replay_ms(graph), 1e-3))) for graph in graphs]
    times: list[list[float]] = [[] for _ in variants]
    for index in range(rounds + 1):
        for graph, count, calls, found in zip(graphs, counts, variants, times, strict=True):
            milliseconds = _timed(_repeat(graph, count))
            if index:  # the first round warms up
                found.append(milliseconds / (count * len(calls)))
    return times


def _timed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth_tb_s(num_bytes: int = 1 << 32) -> float:
    """Device-to-device copy by kernels, bytes read plus bytes written, in TB/s; median of 9."""
    source = torch.randn(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = sorted(_timed(lambda: [target.copy_(source) for _ in range(4)]) / 4 for _ in range(9))
    return 2 * num_bytes / times[4] / 1e9
