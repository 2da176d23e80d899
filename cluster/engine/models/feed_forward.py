"""What follows the attention of a layer, as the decoder sees it, and the dense network that most models have.

Shape legend: T rows of the step, K hidden size, F feed-forward size. `l` after a letter: this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.models.sharding_plan import ShardingPlan
from cluster.engine.parallel.group import ParallelGroup


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a layer is computed: a device's operations, the ranks that share the model, this rank's part."""

    ops: Ops
    group: ParallelGroup
    plan: ShardingPlan

    def into_residual(self, x_TC: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """(T, K) in the dtype of the residual stream: an update is not rounded before it is added."""
        update_TKl = self.ops.linear(x_TC, weight, out_dtype=self.ops.residual_dtype)
        return self.group.all_gather_columns(update_TKl, self.plan.hidden_widths)


class FeedForward(Protocol):
    """Owns the weights of one layer's network on one rank."""

    @property
    def first_weight(self) -> LinearWeight | None:
        """What alone reads the input of `update`, which may come prepared for it; None: several do."""
        ...

    def update(self, normed_TK: torch.Tensor, placement: Placement) -> torch.Tensor:
        """(T, K), whole on every rank, in the dtype of the residual stream: what the network adds to it."""
        ...


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    """down(silu(gate(x)) * up(x)), every layer split by output columns."""

    gate_up: LinearWeight  # rows [gate; up] of this rank
    down: LinearWeight

    @property
    def first_weight(self) -> LinearWeight:
        return self.gate_up

    def update(self, normed_TK: torch.Tensor, placement: Placement) -> torch.Tensor:
        return self.through(normed_TK, placement, placement.plan.ffn_widths)

    def through(self, normed_TK: torch.Tensor, placement: Placement, widths: tuple[int, ...]) -> torch.Tensor:
        """`update` of a network whose ranks hold `widths` of its F columns."""
        if placement.group.size == 1:
            active_TF = placement.ops.linear_silu_mul(normed_TK, self.gate_up, input_of=self.down)
        else:  # an FP8 layer quantises whole rows, so after the gather
            active_TFl = placement.ops.linear_silu_mul(normed_TK, self.gate_up)
            active_TF = placement.group.all_gather_columns(active_TFl, widths)
        return placement.into_residual(active_TF, self.down)
