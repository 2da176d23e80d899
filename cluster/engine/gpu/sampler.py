"""Logits -> tokens for all rows of a step, without waiting for the device.

The tokens are those of `sampling/sampler.py`, bit for bit: the argmax for greedy rows, the same noise and
the same cuts for the others. Nothing here reads a value back, so the host is free for the next step.

Shape legend: R rows with logits, D rows that are drawn, F rows with filters, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.batch import DrawnRow
from cluster.engine.gpu.host_copy import HostCopy, to_device
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.draw import draw_tokens, ranks
from cluster.engine.sampling import elementary, filters
from cluster.engine.sampling.logprobs import LogprobRows
from cluster.engine.sampling.processors import LogitsProcessor
from cluster.types import SamplingParams

_FILTERED_AT_ONCE = 32  # rows that are sorted together: bounds the memory


@dataclass(frozen=True, slots=True)
class RowStats:
    """Of raw logits: maximum, logsumexp and the lowest id of the maximum. NaN shows in the logsumexp."""

    maximum_R: torch.Tensor
    logsumexp_R: torch.Tensor
    argmax_R: torch.Tensor

    def rows(self, start: int, stop: int) -> RowStats:
        return RowStats(self.maximum_R[start:stop], self.logsumexp_R[start:stop], self.argmax_R[start:stop])


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """On their way to the host; read them after the step's event."""

    token_ids_R: HostCopy
    is_broken_R: HostCopy
    logprobs: HostLogprobs | None
    logprob_places: dict[int, int]  # row -> place in `logprobs`
    num_top: list[int]  # by place


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """`LogprobRows` on their way to the host."""

    token_ids_R: HostCopy
    logprobs_R: HostCopy
    ranks_R: HostCopy
    top_ids_Rk: HostCopy
    top_logprobs_Rk: HostCopy

    @staticmethod
    def of(rows: LogprobRows) -> HostLogprobs:
        return HostLogprobs(
            HostCopy(rows.token_ids_R), HostCopy(rows.logprobs_R), HostCopy(rows.ranks_R),
            HostCopy(rows.top_ids_Rk), HostCopy(rows.top_logprobs_Rk),
        )  # fmt: skip

    def arrived(self) -> LogprobRows:
        return LogprobRows(
            self.token_ids_R.host, self.logprobs_R.host, self.ranks_R.host,
            self.top_ids_Rk.host, self.top_logprobs_Rk.host,
        )  # fmt: skip


class GpuSampler:
    """One per runner; keeps the token histories of running sequences that have penalties."""

    def __init__(self, ops: CudaOps) -> None:
        self._ops = ops
        self._processor = LogitsProcessor()

    def sample(
        self, logits_RV: torch.Tensor, stats: RowStats, drawn: Sequence[DrawnRow], tokens_R: torch.Tensor
    ) -> DrawnRows:
        """Draw one token for each row into `tokens_R` (int64, on the device); row r has the logits for
        `drawn[r]`. The raw logits are not changed."""
        is_broken_R = ~torch.isfinite(stats.logsumexp_R)
        if all(draw.sequence.draws_plainly for draw in drawn):
            tokens_R.copy_(stats.argmax_R)
            return DrawnRows(HostCopy(tokens_R), HostCopy(is_broken_R), None, {}, [])
        chosen_from_RV, chosen_stats = self._processed(logits_RV, stats, drawn)
        if chosen_stats is not stats:
            is_broken_R |= ~torch.isfinite(chosen_stats.maximum_R)
        tokens_R.copy_(chosen_stats.argmax_R)
        noisy = [row for row, draw in enumerate(drawn) if not draw.sequence.request.sampling.is_greedy]
        if noisy:
            self._draw(chosen_from_RV, chosen_stats.maximum_R, drawn, noisy, tokens_R)
        places: dict[int, int] = {}
        num_top: list[int] = []
        for row, draw in enumerate(drawn):
            asked = draw.sequence.request.sampling.logprobs
            if asked is not None:
                places[row] = len(num_top)
                num_top.append(asked)
        logprobs = None
        if places:
            logprobs = HostLogprobs.of(self._logprobs(logits_RV, stats, tokens_R, places, max(num_top)))
        return DrawnRows(HostCopy(tokens_R), HostCopy(is_broken_R), logprobs, places, num_top)

    def prompt_logprobs(
        self, logits_RV: torch.Tensor, stats: RowStats, token_ids: Sequence[int], num_top: int
    ) -> HostLogprobs:
        """Of given tokens, one per row."""
        tokens_R = to_device(np.asarray(token_ids, np.int64), logits_RV.device)
        return HostLogprobs.of(logprob_rows(logits_RV, stats.logsumexp_R, tokens_R, num_top))

    def _processed(
        self, logits_RV: torch.Tensor, stats: RowStats, drawn: Sequence[DrawnRow]
    ) -> tuple[torch.Tensor, RowStats]:
        """Logits after bias, penalties and minimum length, and their statistics; the raw ones if no row asks."""
        rows = [row for row, draw in enumerate(drawn) if self._processor.is_needed(draw.sequence, _num_output(draw))]
        if not rows:
            return logits_RV, stats
        logits_RV = logits_RV.clone()
        for row in rows:
            self._processor.apply(logits_RV[row], drawn[row].sequence, _num_output(drawn[row]))
        return logits_RV, RowStats(*self._ops.vocab_stats(logits_RV))

    def _draw(
        self,
        logits_RV: torch.Tensor,
        top_R: torch.Tensor,
        drawn: Sequence[DrawnRow],
        rows: list[int],
        tokens_R: torch.Tensor,
    ) -> None:
        device = logits_RV.device
        params = [drawn[row].sequence.request.sampling for row in rows]
        numbers_D2 = np.full((len(rows), 2), -math.inf, np.float32)
        numbers_D2[:, 0] = [filters.inverse_temperature(sampling) for sampling in params]
        numbers = to_device(numbers_D2, device)
        filtered = [place for place, sampling in enumerate(params) if has_filters(sampling, logits_RV.shape[1])]
        for start in range(0, len(filtered), _FILTERED_AT_ONCE):
            places = filtered[start : start + _FILTERED_AT_ONCE]
            rows_F = to_device(np.asarray([rows[place] for place in places], np.int64), device)
            places_F = to_device(np.asarray(places, np.int64), device)
            scaled_FV = (logits_RV[rows_F] - top_R[rows_F, None]).mul_(numbers[places_F, :1])
            numbers[places_F, 1] = lowest_values(scaled_FV, [params[place] for place in places])
        draw_tokens(
            logits_RV,
            top_R,
            to_device(np.asarray(rows, np.int32), device),
            numbers,
            to_device(np.asarray([sampling.seed for sampling in params], np.int64), device),
            to_device(np.asarray([drawn[row].position for row in rows], np.int32), device),
            tokens_R,
        )

    def _logprobs(
        self,
        logits_RV: torch.Tensor,
        stats: RowStats,
        tokens_R: torch.Tensor,
        places: dict[int, int],
        num_top: int,
    ) -> LogprobRows:
        logsumexp_R = stats.logsumexp_R
        if len(places) < len(tokens_R):
            rows = to_device(np.asarray(list(places), np.int64), logits_RV.device)
            logits_RV, logsumexp_R, tokens_R = logits_RV[rows], logsumexp_R[rows], tokens_R[rows]
        return logprob_rows(logits_RV, logsumexp_R, tokens_R, num_top)


def _num_output(draw: DrawnRow) -> int:
    """Tokens put out before the one to be drawn."""
    return draw.position - draw.sequence.prompt_length


def logprob_rows(
    logits_RV: torch.Tensor, logsumexp_R: torch.Tensor, tokens_R: torch.Tensor, num_top: int
) -> LogprobRows:
    """`sampling.logprobs.logprob_rows` from a logsumexp that is there, without a sort."""
    chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    top_ids_Rk = top_ids(logits_RV, min(num_top, logits_RV.shape[1]))
    top_logprobs_Rk = logits_RV.gather(1, top_ids_Rk) - logsumexp_R.unsqueeze(1)
    return LogprobRows(tokens_R, chosen_R - logsumexp_R, ranks(logits_RV, tokens_R), top_ids_Rk, top_logprobs_Rk)


def top_ids(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """(R, count) ids by descending logit, ties by the lower id: each key holds a value and an id, so that no
    two are equal."""
    if count == 0:
        return torch.empty((len(logits_RV), 0), dtype=torch.int64, device=logits_RV.device)
    bits_RV = (logits_RV + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 ranks like 0
    ascending_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV)
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return ((ascending_RV << 32) | (0xFFFFFFFF - ids_V)).topk(count, dim=1).indices


def has_filters(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.min_p > 0.0 or 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def lowest_values(scaled_FV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """(F,) fp32: min-p, top-k and top-p as `sampling/filters.py` cuts, each row with its own parameters."""
    device, vocab_size = scaled_FV.device, scaled_FV.shape[1]
    min_p = [math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf for sampling in params]
    lowest_F = to_device(np.asarray(min_p, np.float32), device)
    sorted_FV = scaled_FV.sort(dim=1, descending=True).values
    top_k = [sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size for sampling in params]
    last_F = to_device(np.asarray(top_k, np.int64) - 1, device)
    kth_F = sorted_FV.gather(1, last_F[:, None]).squeeze(1)
    is_cut_F = last_F + 1 < vocab_size
    lowest_F = torch.where(is_cut_F, torch.maximum(lowest_F, kth_F), lowest_F)
    if all(sampling.top_p == 1.0 for sampling in params):
        return lowest_F
    mass_FV = elementary.exp_of_nonpositive(sorted_FV).mul_(filters.MASS_SCALE).to(torch.int64)
    mass_FV.masked_fill_(sorted_FV < lowest_F[:, None], 0)
    through_FV = mass_FV.cumsum(1)
    total_F = through_FV[:, -1]
    top_p_F = to_device(np.asarray([sampling.top_p for sampling in params], np.float64), device)
    wanted_F = torch.ceil(top_p_F * total_F.double()).to(torch.int64).clamp_(min=1).minimum(total_F)
    place_F = torch.searchsorted(through_FV, wanted_F[:, None])
    value_F = sorted_FV.gather(1, place_F.clamp_(max=vocab_size - 1)).squeeze(1)
    return torch.where(top_p_F < 1.0, torch.maximum(lowest_F, value_F), lowest_F)
