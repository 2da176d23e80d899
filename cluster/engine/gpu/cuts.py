"""min-p, top-k and top-p of several rows at once, as `sampling/filters.py` cuts, each row with its own parameters.

Shape legend: F rows with filters, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cluster.engine.host_values import to_device
from cluster.engine.sampling import elementary, filters
from cluster.types import SamplingParams


def has_filters(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.min_p > 0.0 or 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


class Cuts:
    """The parameters of F rows on the device."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> None:
        min_p = [math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf for sampling in params]
        top_k = [sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size for sampling in params]
        self._min_p_F = to_device(np.asarray(min_p, np.float32), device)
        self._last_F = to_device(np.asarray(top_k, np.int64) - 1, device)
        self._top_p_F = None
        if any(sampling.top_p != 1.0 for sampling in params):
            self._top_p_F = to_device(np.asarray([sampling.top_p for sampling in params], np.float64), device)

    def lowest_values(self, scaled_FV: torch.Tensor) -> torch.Tensor:
        """(F,) fp32: what remains of each row has at least this value."""
        vocab_size = scaled_FV.shape[1]
        sorted_FV = scaled_FV.sort(dim=1, descending=True).values
        kth_F = sorted_FV.gather(1, self._last_F[:, None]).squeeze(1)
        is_cut_F = self._last_F + 1 < vocab_size
        lowest_F = torch.where(is_cut_F, torch.maximum(self._min_p_F, kth_F), self._min_p_F)
        if self._top_p_F is None:
            return lowest_F
        mass_FV = elementary.exp_of_nonpositive(sorted_FV).mul_(filters.MASS_SCALE).to(torch.int64)
        mass_FV.masked_fill_(sorted_FV < lowest_F[:, None], 0)
        through_FV = mass_FV.cumsum(1)
        total_F = through_FV[:, -1]
        wanted_F = torch.ceil(self._top_p_F * total_F.double()).to(torch.int64).clamp_(min=1).minimum(total_F)
        place_F = torch.searchsorted(through_FV, wanted_F[:, None])
        value_F = sorted_FV.gather(1, place_F.clamp_(max=vocab_size - 1)).squeeze(1)
        return torch.where(self._top_p_F < 1.0, torch.maximum(lowest_F, value_F), lowest_F)
