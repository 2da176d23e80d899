"""Graphs of the layers of steps with prompts: captured for all shapes at start, with what they cost.

Logits are made outside: a graph with them would be needed for every number of rows that are drawn from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from cluster.engine.gpu.graphs import GraphStore, HiddenRows
from cluster.engine.gpu.prompt_shapes import PromptShapes
from cluster.engine.gpu.shapes import StepShape

logger = logging.getLogger(__name__)

_MIB = 1 << 20
_PROBED = 3
_MOST_GRAPH_BYTES = 16 * _MIB  # a graph's own; more is what another process took in the meantime
Forward = Callable[[StepShape], HiddenRows]


@dataclass(frozen=True, slots=True)
class GraphCosts:
    """Of some graphs, as they were captured."""

    count: int
    pool_bytes: int  # what they share, for the tensors in them
    other_bytes: int  # on the device, beside torch's memory: what the graphs themselves take
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.count} in {self.seconds:.1f} s, {self.pool_bytes / _MIB:.0f} MiB for their tensors, "
            f"{self.other_bytes / _MIB:.0f} MiB for themselves"
        )


class PromptGraphs:
    """Owns the graphs. `costs` is None until they are captured; `num_replays` counts steps."""

    def __init__(self, store: GraphStore[HiddenRows], shapes: PromptShapes, device: torch.device) -> None:
        self.costs: GraphCosts | None = None
        self.num_replays = 0
        self._store, self._shapes, self._device = store, shapes, device

    def capture(self, forward: Forward) -> None:
        """`forward` runs once for each shape before it is captured, on inputs that were staged before: none of it
        may be in a graph."""
        self.costs = self._capture(forward, list(self._shapes))
        logger.info("graphs of steps with prompts: %s", self.costs)

    def expected_bytes(self, forward: Forward) -> int:
        """What `capture` will take, from the largest few, which are captured; then this object has had its day."""
        shapes = list(islice(self._shapes, _PROBED))
        for shape in shapes:  # what is loaded with a kernel's first launch is no graph's
            forward(shape)
        costs = self._capture(forward, shapes)
        each = min(costs.other_bytes // max(costs.count, 1), _MOST_GRAPH_BYTES)
        return costs.pool_bytes + each * sum(1 for _ in self._shapes)

    def replay(self, shape: StepShape) -> HiddenRows | None:
        """None: there is no graph for this shape, whatever logits it wants."""
        if shape.num_prompts_max is None:
            return None
        found = self._store.replay(replace(shape, num_logits=0))
        self.num_replays += found is not None
        return found

    def _capture(self, forward: Forward, shapes: Sequence[StepShape]) -> GraphCosts:
        start_s, (used, reserved) = time.perf_counter(), self._memory()
        for shape in shapes:
            forward(shape)
            self._store.capture(shape, partial(forward, shape))
        used_after, reserved_after = self._memory()
        pool_bytes = max(0, reserved_after - reserved)
        return GraphCosts(
            len(shapes), pool_bytes, max(0, used_after - used - pool_bytes), time.perf_counter() - start_s
        )

    def _memory(self) -> tuple[int, int]:
        """Bytes of the device in use, by anyone; and those that torch holds here, without what it only keeps."""
        if self._device.type != "cuda":
            return 0, 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, torch.cuda.memory_reserved(self._device)
