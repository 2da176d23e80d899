"""Logits -> tokens for all rows of a step, without waiting for the device.

The tokens are those of `sampling/sampler.py`, bit for bit: the argmax for greedy rows, the same noise and
the same cuts for the others. Nothing here reads a value back, so the host is free for the next step.

Shape legend: R rows with logits, D rows that are drawn with noise, F rows with filters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.gpu.draws import Draws
from cluster.engine.gpu.host_copy import HostCopy, pinned_zeros
from cluster.engine.host_values import to_device
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.draw import draw_tokens, ranks
from cluster.engine.kernels.triton.step import tell_step
from cluster.engine.sampling.logprobs import LogprobRows
from cluster.engine.sampling.processors import LogitsProcessor

_RANKED_AT_ONCE = 32  # rows whose highest logits are looked for together: bounds the memory


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
    """On their way to the host; read them after the step's event, and before as many steps have been launched after it
    as there are buffers (`GpuSampler`)."""

    words_3R: npt.NDArray[np.int32]  # token ids; bits of two fp32 that are finite where a row's logits are sound
    logprobs: HostLogprobs | None
    logprob_places: dict[int, int]  # row -> place in `logprobs`
    num_top: list[int]  # by place

    def token_ids(self) -> list[int]:
        ids: list[int] = self.words_3R[0].tolist()
        return ids

    @property
    def is_broken_R(self) -> npt.NDArray[np.bool_]:
        """Decided on the host, where it takes a microsecond; on a device it takes five launches."""
        first_R, second_R = self.words_3R[1:].view(np.float32)
        is_sound_R: npt.NDArray[np.bool_] = np.isfinite(first_R) & np.isfinite(second_R)
        return ~is_sound_R


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
    """One per runner; keeps the token histories of running sequences that have penalties, and owns the pinned memory
    that steps tell their tokens in: `num_buffers` steps that draw, one after the other, before one must be read."""

    def __init__(self, ops: CudaOps, max_rows: int, num_buffers: int) -> None:
        self._ops = ops
        self._processor = LogitsProcessor()
        self._told = [pinned_zeros(3 * max_rows, ops.device).view(3, max_rows) for _ in range(num_buffers)]
        self._turn = 0

    def sample(self, logits_RV: torch.Tensor, stats: RowStats, draws: Draws, tokens_R: torch.Tensor) -> DrawnRows:
        """Draw one token for each row into `tokens_R` (int64, on the device); row r has the logits for
        the r-th of `draws`. The raw logits are not changed."""
        asked = draws.asked
        if asked.is_plain:
            return DrawnRows(self._tell(stats.argmax_R, stats, stats, tokens_R), None, {}, [])
        chosen_from_RV, chosen_stats = self._processed(logits_RV, stats, draws)
        chosen_R = chosen_stats.argmax_R
        if asked.noise.rows:
            tokens_R.copy_(chosen_R)
            self._draw(chosen_from_RV, chosen_stats.maximum_R, draws, tokens_R)
            chosen_R = tokens_R
        words_3R = self._tell(chosen_R, stats, chosen_stats, tokens_R)
        places, num_top = asked.logprob_places, asked.num_top
        logprobs = None
        if places:
            logprobs = HostLogprobs.of(self._logprobs(logits_RV, stats, tokens_R, places, max(num_top)))
        return DrawnRows(words_3R, logprobs, places, num_top)

    def _tell(
        self, chosen_R: torch.Tensor, raw: RowStats, chosen_from: RowStats, tokens_R: torch.Tensor
    ) -> npt.NDArray[np.int32]:
        """To `tokens_R` and, in stream order, to the host. A NaN shows in the logsumexp of raw logits; processed ones
        may be infinite where they are forbidden, but not at their maximum."""
        self._turn = (self._turn + 1) % len(self._told)
        told = self._told[self._turn]
        sound_too_R = raw.logsumexp_R if chosen_from is raw else chosen_from.maximum_R
        tell_step(chosen_R, raw.logsumexp_R, sound_too_R, tokens_R, told)
        words_3R: npt.NDArray[np.int32] = told.numpy()[:, : len(tokens_R)]
        return words_3R

    def prompt_logprobs(
        self, logits_RV: torch.Tensor, stats: RowStats, token_ids: Sequence[int], num_top: int
    ) -> HostLogprobs:
        """Of given tokens, one per row."""
        tokens_R = to_device(np.asarray(token_ids, np.int64), logits_RV.device)
        return HostLogprobs.of(logprob_rows(logits_RV, stats.logsumexp_R, tokens_R, num_top))

    def _processed(self, logits_RV: torch.Tensor, stats: RowStats, draws: Draws) -> tuple[torch.Tensor, RowStats]:
        """Logits after bias, penalties and minimum length, and their statistics; the raw ones if no row asks."""
        sequences, positions = draws.asked.sequences, draws.positions
        num_output = {row: int(positions[row]) - sequences[row].prompt_length for row in draws.asked.processed_rows}
        rows = [row for row, count in num_output.items() if self._processor.is_needed(sequences[row], count)]
        if not rows:
            return logits_RV, stats
        logits_RV = logits_RV.clone()
        for row in rows:
            self._processor.apply(logits_RV[row], sequences[row], num_output[row])
        return logits_RV, RowStats(*self._ops.vocab_stats(logits_RV))

    def _draw(self, logits_RV: torch.Tensor, top_R: torch.Tensor, draws: Draws, tokens_R: torch.Tensor) -> None:
        device, noise = logits_RV.device, draws.asked.noise
        rows_D, seeds_D, numbers_D2 = noise.tensors(device)
        for part in noise.cuts(logits_RV.shape[1], device):
            scaled_FV = (logits_RV[part.rows_F] - top_R[part.rows_F, None]).mul_(numbers_D2[part.places_F, :1])
            numbers_D2[part.places_F, 1] = part.cuts.lowest_values(scaled_FV)
        positions_D = to_device(draws.positions[noise.rows], device)
        draw_tokens(logits_RV, top_R, rows_D, numbers_D2, seeds_D, positions_D, tokens_R)

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


def logprob_rows(
    logits_RV: torch.Tensor, logsumexp_R: torch.Tensor, tokens_R: torch.Tensor, num_top: int
) -> LogprobRows:
    """`sampling.logprobs.logprob_rows` from a logsumexp that is there, without a sort."""
    chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    top_ids_Rk = top_ids(logits_RV, min(num_top, logits_RV.shape[1]))
    top_logprobs_Rk = logits_RV.gather(1, top_ids_Rk) - logsumexp_R.unsqueeze(1)
    return LogprobRows(tokens_R, chosen_R - logsumexp_R, ranks(logits_RV, tokens_R), top_ids_Rk, top_logprobs_Rk)


def top_ids(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """(R, count) ids by descending logit, ties by the lower id."""
    if count == 0:
        return torch.empty((len(logits_RV), 0), dtype=torch.int64, device=logits_RV.device)
    starts = range(0, len(logits_RV), _RANKED_AT_ONCE)
    return torch.cat([_top_ids(logits_RV[start : start + _RANKED_AT_ONCE], count) for start in starts])


def _top_ids(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """Each key holds a value and an id, so that no two are equal. Takes 32 bytes for each logit."""
    bits_RV = (logits_RV + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 ranks like 0
    ascending_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV)
    ids_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return ((ascending_RV << 32) | (0xFFFFFFFF - ids_V)).topk(count, dim=1).indices
