"""Softmax attention in splits, one rounding at a time: the parts that do not depend on where keys lie."""

from __future__ import annotations

import torch

from cluster.engine.kernels.cpu.arithmetic import exp

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # maximum (R, 1), sum of weights (R, 1), weighted values


def split_weights(
    scores_RC: torch.Tensor, is_visible_RC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(maximum (R, 1), sum of weights (R, 1), weights (R, C)) of one split; what is not visible weighs 0."""
    lowest = torch.full_like(scores_RC, -torch.inf)
    best = torch.where(is_visible_RC, scores_RC, lowest).amax(dim=1, keepdim=True)
    shift = torch.where(best == -torch.inf, torch.zeros_like(best), best)
    weights = torch.where(is_visible_RC, exp(scores_RC - shift), torch.zeros_like(scores_RC))
    total = torch.zeros_like(best)
    for key in range(weights.shape[1]):
        total = total + weights[:, key : key + 1]
    return best, total, weights


def merge(left: Split, right: Split) -> Split:
    best = torch.maximum(left[0], right[0])
    scale_left, scale_right = exp(left[0] - best), exp(right[0] - best)
    return best, left[1] * scale_left + right[1] * scale_right, left[2] * scale_left + right[2] * scale_right


def rotate(x_THD: torch.Tensor, cos_sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of fp32 rows, half-split; cos in the first half of `cos_sin_TD`, sin in the second."""
    first, second = x_THD.chunk(2, dim=2)
    cos, sin = cos_sin_TD[:, None].chunk(2, dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)
