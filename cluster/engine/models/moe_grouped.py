"""DeepSeek's mixture of experts: chosen by group, with experts beside them that every token uses.

Shape legend as in `moe.py`, whose placement of experts it shares. The result is the combination of the chosen
experts, rounded to the type of the residual stream, plus the network of the shared experts, rounded likewise:
one addition, one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import ExpertWeight, GroupedRouting, LinearWeight
from cluster.engine.models.feed_forward import DenseFeedForward, Placement


@dataclass(frozen=True, slots=True)
class GroupedMoeFeedForward:
    """The router is whole on every rank; `gate_up` and `down` hold `plan.experts`, `shared` is split by column."""

    router: LinearWeight  # (E, K)
    bias_E: torch.Tensor | None  # fp32, affects the choice only
    routing: GroupedRouting
    gate_up: ExpertWeight  # rows [gate; up] of each expert
    down: ExpertWeight
    shared: DenseFeedForward | None

    @property
    def first_weight(self) -> None:
        """The router and the experts read the input."""
        return None

    def update(self, normed_TK: torch.Tensor, placement: Placement) -> torch.Tensor:
        ops, plan = placement.ops, placement.plan
        logits_TE = ops.linear(normed_TK, self.router, out_dtype=torch.float32)
        choice = ops.moe_route_grouped(logits_TE, self.bias_E, self.routing)
        local_TJK = ops.moe_experts(
            normed_TK, choice.experts_TJ, self.gate_up, self.down, first_expert=plan.experts.start
        )
        rows_TJK = placement.group.gather_expert_rows(local_TJK, choice.experts_TJ, plan.expert_counts)
        routed_TK = ops.moe_combine(rows_TJK, choice.weights_TJ)
        if self.shared is None:
            return routed_TK
        return routed_TK + self.shared.through(normed_TK, placement, plan.shared_widths)
