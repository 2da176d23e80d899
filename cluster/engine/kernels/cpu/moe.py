"""Mixture of experts on a CPU: each expert is a linear layer over the rows that chose it.

Shared by the reference and the native operations, which bring the arithmetic; here only rows are moved.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from cluster.engine.kernels.cpu.arithmetic import exp
from cluster.engine.kernels.ops import ExpertChoice, ExpertWeight, GroupedRouting, LinearWeight, Ops

_STEPS = 2.0**40  # of a probability of 1, in `_exact_sum`


class PackedExperts:
    """One packed weight per expert."""

    __slots__ = ("experts",)

    def __init__(self, experts: list[LinearWeight]) -> None:
        self.experts = experts

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def out_features(self) -> int:
        return self.experts[0].out_features

    @property
    def in_features(self) -> int:
        return self.experts[0].in_features

    @property
    def num_bytes(self) -> int:
        return sum(expert.num_bytes for expert in self.experts)


class ExpertLoop:
    """The operations on experts, in terms of the class's `linear`, `linear_silu_mul` and `softmax`."""

    def pack_experts(self: Ops, weight_ENK: torch.Tensor) -> PackedExperts:
        return PackedExperts([self.pack_linear(weight_NK) for weight_NK in weight_ENK])

    def moe_route(self: Ops, logits_TE: torch.Tensor, top_k: int, *, renormalise: bool) -> ExpertChoice:
        probabilities_TE = self.softmax(logits_TE)
        # A stable sort: of equal probabilities the lower index comes first. NaN fills whole rows, and as 0
        # it chooses the first experts.
        ranked_TE = probabilities_TE.nan_to_num(0.0).argsort(dim=1, descending=True, stable=True)
        experts_TJ = ranked_TE[:, :top_k].sort(dim=1).values
        weights_TJ = probabilities_TE.gather(1, experts_TJ)
        if renormalise:
            weights_TJ = weights_TJ / _exact_sum(weights_TJ)
        return ExpertChoice(experts_TJ.int(), weights_TJ)

    def moe_route_grouped(
        self: Ops, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: GroupedRouting
    ) -> ExpertChoice:
        is_softmax = routing.scoring == "softmax"
        scores_TE = self.softmax(logits_TE) if is_softmax else 1.0 / (exp(-logits_TE) + 1.0)
        ranking_TE = scores_TE if bias_E is None else scores_TE + bias_E
        is_broken_T1 = ranking_TE.isnan().any(dim=1, keepdim=True)
        ranking_TE = torch.where(is_broken_T1, torch.zeros_like(ranking_TE), ranking_TE)
        ranking_TE = ranking_TE.masked_fill(~_in_best_groups(ranking_TE, routing), -torch.inf)
        experts_TJ = _first(ranking_TE, routing.top_k).sort(dim=1).values
        weights_TJ = scores_TE.gather(1, experts_TJ)
        weights_TJ = torch.where(is_broken_T1, torch.full_like(weights_TJ, torch.nan), weights_TJ)
        if routing.renormalise:
            weights_TJ = weights_TJ / _exact_sum(weights_TJ).clamp_min(1.0 / _STEPS)
        return ExpertChoice(experts_TJ.int(), weights_TJ * routing.scale)

    def moe_experts(
        self: Ops,
        x_TK: torch.Tensor,
        experts_TJ: torch.Tensor,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        *,
        first_expert: int = 0,
    ) -> torch.Tensor:
        assert isinstance(gate_up, PackedExperts)
        assert isinstance(down, PackedExperts)
        num_rows, top_k = experts_TJ.shape
        rows_PK = torch.empty((num_rows * top_k, down.out_features), dtype=self.residual_dtype)
        experts_P = experts_TJ.flatten().long() - first_expert
        order_P = experts_P.argsort(stable=True)
        bounds = torch.searchsorted(experts_P[order_P], torch.arange(gate_up.num_experts + 1)).tolist()
        for index, (start, stop) in enumerate(pairwise(bounds)):
            if start == stop:
                continue
            pairs = order_P[start:stop]
            active_RF = self.linear_silu_mul(x_TK.index_select(0, pairs // top_k), gate_up.experts[index])
            rows_PK[pairs] = self.linear(active_RF, down.experts[index], out_dtype=self.residual_dtype)
        return rows_PK.view(num_rows, top_k, down.out_features)


def _exact_sum(weights_TJ: torch.Tensor) -> torch.Tensor:
    """(T, 1) fp32 sums of numbers from 0 to 1 in whole steps of 2^-40: integers, which any order adds alike."""
    return (weights_TJ * _STEPS).long().sum(dim=1, keepdim=True).float() / _STEPS


def _first(values_TE: torch.Tensor, count: int) -> torch.Tensor:
    """(T, count) positions of the largest; of equal ones the lower come first, for the sort is stable."""
    return values_TE.argsort(dim=1, descending=True, stable=True)[:, :count]


def _in_best_groups(ranking_TE: torch.Tensor, routing: GroupedRouting) -> torch.Tensor:
    """(T, E) bool."""
    num_rows, num_experts = ranking_TE.shape
    groups_TGE = ranking_TE.view(num_rows, routing.num_groups, -1)
    if routing.scoring == "softmax" or groups_TGE.shape[2] == 1:
        value_TG = groups_TGE.amax(dim=2)
    else:
        value_TG = groups_TGE.topk(2, dim=2).values.sum(dim=2)
    is_best_TG = torch.zeros_like(value_TG, dtype=torch.bool)
    is_best_TG.scatter_(1, _first(value_TG, routing.top_groups), True)
    return is_best_TG.repeat_interleave(num_experts // routing.num_groups, dim=1)
