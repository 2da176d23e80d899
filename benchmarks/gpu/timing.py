"""Timing on a CUDA device: one graph over rotating inputs, median of replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def graph_ms(calls: Sequence[Callable[[], object]], *, min_ms: float = 4.0, replays: int = 5) -> float:
    """Median milliseconds of one call. `calls` do the same on different inputs, so that L2 stays cold.

    Everything runs once before capture, which compiles kernels and sizes workspaces.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = _capture(calls)
    once = _replay_ms(graph)
    rounds = max(1, min(200, round(min_ms / max(once, 1e-3))))
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(calls)))
    del graph
    return sorted(times)[len(times) // 2]


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth_tb_s(num_bytes: int = 1 << 32) -> float:
    """Device-to-device copy, bytes read plus bytes written, in TB/s."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = graph_ms([lambda: target.copy_(source)], min_ms=20)
    return 2 * num_bytes / milliseconds / 1e9
