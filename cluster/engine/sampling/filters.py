"""temperature, min-p, top-k, top-p: from the logits of a row to the candidates of a draw.

All thresholds are on values, so tokens with equal logits share their fate and nothing depends on an
order of sorting. Probability mass is summed in integers (units of 2**-40 of the most likely token's),
which is exact in any order: the same cut on any device, for any thread count or vocabulary sharding.

    top-p keeps token v  iff  mass of all tokens strictly above v  <  top_p * total mass

Shape legend: V vocabulary, C candidates.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cluster.engine.sampling import elementary
from cluster.types import SamplingParams

MASS_SCALE = 2.0**40
_LARGEST_FACTOR = 1e30  # keeps 0 * factor a number for any temperature above 0


def inverse_temperature(sampling: SamplingParams) -> float:
    """What logits are multiplied by: a division may be done differently on another device."""
    return float(np.float32(min(1.0 / sampling.temperature, _LARGEST_FACTOR)))


def scale(logits_V: torch.Tensor, top: float, sampling: SamplingParams) -> torch.Tensor:
    """(logits - top) / temperature, with `top` the finite maximum: 0 at the top, all else below."""
    return (logits_V - top).mul_(inverse_temperature(sampling))


def lowest_value(scaled_V: torch.Tensor, sampling: SamplingParams) -> float:
    """What min-p and top-k leave has at least this value; -inf if both are off."""
    lowest = -math.inf
    if sampling.min_p > 0.0:
        lowest = float(np.float32(math.log(sampling.min_p)))
    if 0 < sampling.top_k < len(scaled_V):
        lowest = max(lowest, float(scaled_V.topk(sampling.top_k, sorted=False).values.min()))
    return lowest


def candidates(scaled_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor | None:
    """Ascending ids of the tokens that may be drawn; None: all of them.

    In vLLM's order: min-p and top-k, then top-p over the mass of what is left.
    """
    lowest = lowest_value(scaled_V, sampling)
    if lowest == -math.inf and sampling.top_p == 1.0:
        return None
    ids_C = (scaled_V >= lowest).nonzero().squeeze(-1)
    if sampling.top_p == 1.0:
        return ids_C
    scaled_C = scaled_V[ids_C]
    return ids_C[scaled_C >= _top_p_value(scaled_C, sampling.top_p)]


def _top_p_value(scaled_C: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest value that top-p keeps."""
    mass_C = elementary.exp_of_nonpositive(scaled_C).mul_(MASS_SCALE).to(torch.int64)
    sorted_C, order_C = scaled_C.sort(descending=True)
    mass_through_C = mass_C[order_C].cumsum(0)
    wanted = top_p_mass(int(mass_through_C[-1]), top_p)
    # The first place at which the mass through it reaches what is wanted is the last that is kept.
    return sorted_C[torch.searchsorted(mass_through_C, wanted)]


def top_p_mass(total: int, top_p: float) -> int:
    """The mass that is kept at least; > 0 and at most `total`."""
    return min(max(math.ceil(top_p * total), 1), total)
