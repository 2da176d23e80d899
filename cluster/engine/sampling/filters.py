"""temperature, min-p, top-k, top-p: from the logits of a row to the candidates of a draw.

All thresholds are on values, so tokens with equal logits share their fate and nothing depends on an
order of sorting. Probability mass is summed in integers (2**-40 of the most likely token's), which is
exact in any order: the same cut for any device, thread count or vocabulary sharding.

    top-p keeps token v  iff  mass of all tokens strictly above v  <  top_p * total mass

Shape legend: V vocabulary, C candidates.
"""

from __future__ import annotations

import math

import torch

from cluster.engine.sampling import elementary
from cluster.types import SamplingParams

_MASS_SCALE = 2.0**40


def scale(logits_V: torch.Tensor, top: float, temperature: float) -> torch.Tensor:
    """(logits - top) / temperature, with `top` the finite maximum: 0 at the top, all else below."""
    return (logits_V - top).div_(temperature)


def candidates(scaled_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor | None:
    """Ascending ids of the tokens that may be drawn; None: all of them.

    In vLLM's order: min-p, then top-k among what is left, then top-p over the mass of what is left.
    """
    floor = -math.inf
    if sampling.min_p > 0.0:
        floor = math.log(sampling.min_p)
    if 0 < sampling.top_k < len(scaled_V):
        floor = max(floor, float(scaled_V.topk(sampling.top_k).values[-1]))
    if sampling.top_p == 1.0:
        return None if floor == -math.inf else (scaled_V >= floor).nonzero().squeeze(-1)
    ids_C = (scaled_V >= floor).nonzero().squeeze(-1)
    return _top_p(scaled_V[ids_C], ids_C, sampling.top_p)


def _top_p(scaled_C: torch.Tensor, ids_C: torch.Tensor, top_p: float) -> torch.Tensor:
    mass_C = elementary.exp_of_nonpositive(scaled_C).mul_(_MASS_SCALE).to(torch.int64)
    total = int(mass_C.sum())
    # A token with at most (1 - top_p) / C of the mass has, with all below it, at most 1 - top_p, so at
    # least top_p lies above it: it is cut. This leaves few to sort, and is exact.
    smallest = int((total - int(top_p * total)) // len(mass_C))
    is_large = mass_C > smallest
    scaled_C, ids_C, mass_C = scaled_C[is_large], ids_C[is_large], mass_C[is_large]
    sorted_C, order = scaled_C.sort(descending=True)
    mass_through = mass_C[order].cumsum(0)
    # The first place at which the mass through it reaches the target holds the smallest value kept.
    last = int(torch.searchsorted(mass_through, torch.tensor([int(top_p * total)])))
    cut = sorted_C[min(last, len(sorted_C) - 1)]
    return ids_C[scaled_C >= cut]
