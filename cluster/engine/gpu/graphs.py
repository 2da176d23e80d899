"""CUDA graphs of a model's forward pass, one per shape, in one memory pool.

Kernels are chosen while a graph is captured, for its shape; a graph never decides bits. Graphs replay one
after the other, so they share their memory: what one leaves is valid until the next one replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from cluster.engine.gpu.sampler import RowStats
from cluster.engine.gpu.shapes import StepShape


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits (R, V) fp32 and their statistics; valid until the next step is launched."""

    logits_RV: torch.Tensor
    stats: RowStats

    def unowned(self) -> StepOutput:
        stats = self.stats
        return StepOutput(
            _view(self.logits_RV), RowStats(_view(stats.maximum_R), _view(stats.logsumexp_R), _view(stats.argmax_R))
        )


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """What `GpuModel.hidden` returns of the rows that logits may be wanted of, valid until the next graph replays."""

    hidden_RK: torch.Tensor

    def unowned(self) -> HiddenRows:
        return HiddenRows(_view(self.hidden_RK))


class Captured(Protocol):
    """What a graph leaves in its memory."""

    def unowned(self: Output) -> Output:
        """The same tensors, which keep nothing alive."""
        ...


Output = TypeVar("Output", bound=Captured)


class GraphStore(Generic[Output]):
    """Owns the graphs; stores that replay in turns share the memory of a `pool`."""

    def __init__(self, pool: Any) -> None:
        """`pool`: of `torch.cuda.graph_pool_handle`."""
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._pool = pool

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, shape: StepShape, forward: Callable[[], Output]) -> None:
        """`forward` must have run for this shape before: what it compiles or compares cannot be captured.
        Largest shape first, so that the smaller ones find room in the pool."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = forward()
        # Tensors that were kept would keep their memory from the graphs captured later.
        self._graphs[shape] = graph, output.unowned()

    def replay(self, shape: StepShape) -> Output | None:
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


_TYPE_STRINGS = {torch.float32: "<f4", torch.int64: "<i8", torch.int16: "<i2"}
_SAME_SIZE = {torch.bfloat16: torch.int16}  # which that interface has no name for


def _view(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous()
    named = tensor.view(_SAME_SIZE.get(tensor.dtype, tensor.dtype))
    interface = {
        "shape": tuple(named.shape),
        "typestr": _TYPE_STRINGS[named.dtype],
        "data": (named.data_ptr(), False),
        "version": 3,
        "strides": None,
    }
    return torch.as_tensor(_Memory(interface), device=tensor.device).view(tensor.dtype)
