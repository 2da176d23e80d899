"""Log-probabilities under the raw logits: fp32, ordered by value, ties by the lower id.

Shape legend: R rows, V vocabulary, k most likely tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import Ops
from cluster.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Still on the device; `to_host` waits for it."""

    token_ids_R: torch.Tensor
    logprobs_R: torch.Tensor
    ranks_R: torch.Tensor
    top_ids_Rk: torch.Tensor
    top_logprobs_Rk: torch.Tensor

    def to_host(self, num_top: list[int]) -> list[TokenLogprob]:
        """One per row, with the first `num_top[row]` of the most likely tokens."""
        ids, logprobs, ranks = self.token_ids_R.tolist(), self.logprobs_R.tolist(), self.ranks_R.tolist()
        top_ids, top_logprobs = self.top_ids_Rk.tolist(), self.top_logprobs_Rk.tolist()
        return [
            TokenLogprob(
                ids[row],
                logprobs[row],
                ranks[row],
                tuple(zip(top_ids[row][:count], top_logprobs[row][:count], strict=True)),
            )
            for row, count in enumerate(num_top)
        ]


def logprob_rows(ops: Ops, logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top: int) -> LogprobRows:
    """log softmax(logits)[token] = logit - logsumexp, its rank (1 is the most likely), and the first
    `num_top` of the ranking. The rank counts ties with a lower id as more likely, like the ranking."""
    _, logsumexp_R = ops.log_softmax_stats(logits_RV)
    chosen_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(1))
    num_above_R = (logits_RV > chosen_R1).sum(1)
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    num_ties_R = ((logits_RV == chosen_R1) & (ids_V < token_ids_R.unsqueeze(1))).sum(1)
    top_ids_Rk = _top_ids(logits_RV, num_top)
    top_logprobs_Rk = logits_RV.gather(1, top_ids_Rk) - logsumexp_R.unsqueeze(1)
    return LogprobRows(
        token_ids_R, chosen_R1.squeeze(1) - logsumexp_R, num_above_R + num_ties_R + 1, top_ids_Rk, top_logprobs_Rk
    )


def _top_ids(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """(R, count) ids by descending logit, ties by the lower id. `topk` leaves open which of several
    equal values it returns, so only the values it finds are used."""
    count = min(count, logits_RV.shape[1])
    if count == 0:
        return torch.zeros((len(logits_RV), 0), dtype=torch.int64, device=logits_RV.device)
    logits_RV = logits_RV.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # NaN has no order
    smallest_R1 = logits_RV.topk(count).values[:, -1:]
    rows = []
    for row_V, smallest in zip(logits_RV, smallest_R1, strict=True):
        candidates_C = (row_V >= smallest).nonzero().squeeze(-1)  # ascending ids
        order_C = row_V[candidates_C].sort(descending=True, stable=True).indices
        rows.append(candidates_C[order_C[:count]])
    return torch.stack(rows)
