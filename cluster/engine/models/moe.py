"""A mixture of experts in the place of a feed-forward network: each token goes through a few of many.

Shape legend: T rows of the step, K hidden size, E experts, J experts of a row. `l` after a letter: this
rank's part.

Experts are held whole, each by one rank. Every rank routes every row, which gives the same choice
everywhere, and computes the (row, expert) pairs of its own experts. Their results are gathered pair by
pair, never added up before, and combined in the order of the expert index by each rank for itself. So
the bits do not depend on where an expert lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import ExpertWeight, LinearWeight
from cluster.engine.models.feed_forward import Placement


@dataclass(frozen=True, slots=True)
class MoeFeedForward:
    """The router is whole on every rank; `gate_up` and `down` hold `plan.experts`."""

    router: LinearWeight  # (E, K)
    gate_up: ExpertWeight  # rows [gate; up] of each expert
    down: ExpertWeight
    top_k: int
    renormalise: bool

    @property
    def first_weight(self) -> None:
        """The router and the experts read the input."""
        return None

    def update(self, normed_TK: torch.Tensor, placement: Placement) -> torch.Tensor:
        ops, plan = placement.ops, placement.plan
        logits_TE = ops.linear(normed_TK, self.router, out_dtype=torch.float32)
        choice = ops.moe_route(logits_TE, self.top_k, renormalise=self.renormalise)
        local_TJK = ops.moe_experts(
            normed_TK, choice.experts_TJ, self.gate_up, self.down, first_expert=plan.experts.start
        )
        rows_TJK = placement.group.gather_expert_rows(local_TJK, choice.experts_TJ, plan.expert_counts)
        return ops.moe_combine(rows_TJK, choice.weights_TJ)
