"""CUDA graphs of a model's forward pass, one per shape, in one memory pool.

Kernels are chosen while a graph is captured, for its shape; a graph never decides bits. Graphs replay one
after the other, so they share their memory: what one leaves is valid until the next one replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.engine.gpu.sampler import RowStats
from cluster.engine.gpu.shapes import StepShape


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits (R, V) fp32 and their statistics; valid until the next step is launched."""

    logits_RV: torch.Tensor
    stats: RowStats


class GraphStore:
    """Owns the graphs and the memory they share."""

    def __init__(self) -> None:
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, shape: StepShape, forward: Callable[[], StepOutput]) -> None:
        """`forward` must have run for this shape before: what it compiles or compares cannot be captured.
        Largest shape first, so that the smaller ones find room in the pool."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = forward()
        # Tensors that were kept would keep their memory from the graphs captured later.
        self._graphs[shape] = graph, _without_ownership(output)

    def replay(self, shape: StepShape) -> StepOutput | None:
        """None: there is no graph for this shape."""
        found = self._graphs.get(shape)
        if found is None:
            return None
        found[0].replay()
        return found[1]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What torch needs to see a tensor in memory that something else keeps alive."""

    __cuda_array_interface__: dict[str, object]


_TYPE_STRINGS = {torch.float32: "<f4", torch.int64: "<i8"}


def _view(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous()
    interface = {
        "shape": tuple(tensor.shape),
        "typestr": _TYPE_STRINGS[tensor.dtype],
        "data": (tensor.data_ptr(), False),
        "version": 3,
        "strides": None,
    }
    return torch.as_tensor(_Memory(interface), device=tensor.device)


def _without_ownership(output: StepOutput) -> StepOutput:
    stats = output.stats
    return StepOutput(
        _view(output.logits_RV), RowStats(_view(stats.maximum_R), _view(stats.logsumexp_R), _view(stats.argmax_R))
    )
