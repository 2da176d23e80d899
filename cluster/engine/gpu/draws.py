"""Which tokens a step draws, and what their sequences ask for. What is asked for stays while the same
sequences draw; the positions move on."""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.batch import Batch
from cluster.engine.cohort import Cohort
from cluster.engine.gpu.cuts import Cuts, has_filters
from cluster.engine.host_values import to_device
from cluster.engine.sampling import filters
from cluster.engine.sequence import Sequence

_FILTERED_AT_ONCE = 32  # rows that are sorted together: bounds the memory


class Asked:
    """What the sequences of some drawn rows ask for, row by row."""

    def __init__(self, sequences: ListLike[Sequence]) -> None:
        self.sequences = sequences

    @cached_property
    def is_plain(self) -> bool:
        return all(sequence.draws_plainly for sequence in self.sequences)

    @cached_property
    def processed_rows(self) -> list[int]:
        """Rows whose logits may have to be changed before a token is chosen."""
        return [row for row, sequence in enumerate(self.sequences) if _may_be_processed(sequence)]

    @cached_property
    def logprob_places(self) -> dict[int, int]:
        """Row -> place among the rows whose logprobs are wanted."""
        rows = [row for row, each in enumerate(self.sequences) if each.request.sampling.logprobs is not None]
        return {row: place for place, row in enumerate(rows)}

    @cached_property
    def num_top(self) -> list[int]:
        """By place: how many of the most likely tokens are wanted."""
        return [self.sequences[row].request.sampling.logprobs or 0 for row in self.logprob_places]

    @cached_property
    def noise(self) -> Noise:
        return Noise(self.sequences)


class Noise:
    """The rows that are drawn with noise, D of them, and their parameters, on the device from the first use."""

    def __init__(self, sequences: ListLike[Sequence]) -> None:
        self.rows = [row for row, each in enumerate(sequences) if not each.request.sampling.is_greedy]
        self._params = [sequences[row].request.sampling for row in self.rows]
        self._tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._cuts: list[CutRows] | None = None

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (D,) int32, seeds (D,) int64, and (D, 2) fp32: the inverse temperature, and the lowest value that
        may be drawn, which every step writes anew for the rows with `cuts`, in stream order."""
        if self._tensors is None:
            numbers_D2 = np.full((len(self.rows), 2), -math.inf, np.float32)
            numbers_D2[:, 0] = [filters.inverse_temperature(sampling) for sampling in self._params]
            self._tensors = (
                to_device(np.asarray(self.rows, np.int32), device),
                to_device(np.asarray([sampling.seed for sampling in self._params], np.int64), device),
                to_device(numbers_D2, device),
            )
        return self._tensors

    def cuts(self, vocab_size: int, device: torch.device) -> list[CutRows]:
        """The rows of which unlikely tokens are cut, as many in each part as are sorted together."""
        if self._cuts is None:
            filtered = [place for place, each in enumerate(self._params) if has_filters(each, vocab_size)]
            starts = range(0, len(filtered), _FILTERED_AT_ONCE)
            parts = [filtered[start : start + _FILTERED_AT_ONCE] for start in starts]
            self._cuts = [
                CutRows(
                    to_device(np.asarray([self.rows[place] for place in part], np.int64), device),
                    to_device(np.asarray(part, np.int64), device),
                    Cuts([self._params[place] for place in part], vocab_size, device),
                )
                for part in parts
            ]
        return self._cuts


@dataclass(frozen=True, slots=True)
class CutRows:
    rows_F: torch.Tensor
    places_F: torch.Tensor  # among the rows with noise
    cuts: Cuts


class Draws:
    """Row r of a step's logits draws the token at `positions[r]` of `asked.sequences[r]`."""

    __slots__ = ("asked", "positions")

    def __init__(self, asked: Asked, positions: npt.NDArray[np.int32]) -> None:
        self.asked = asked
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)


class DrawRows:
    """The drawn rows of one step after the other; `row_of` finds a sequence's first one, by identity."""

    def __init__(self) -> None:
        self.row_of: dict[int, int] = {}
        self._cohort: Cohort | None = None
        self._asked = Asked(())
        self._first_positions = np.zeros(0, np.int32)

    def of(self, batch: Batch) -> Draws:
        cohort = batch.cohort
        if cohort is None:
            self._cohort = None
            return self._of_entries(batch)
        if cohort is not self._cohort:
            self._cohort = cohort
            self._asked = Asked(cohort.sequences)
            self._first_positions = np.asarray(cohort.starts, np.int32) + 1
            self.row_of = {id(sequence): row for row, sequence in enumerate(cohort.sequences)}
        return Draws(self._asked, self._first_positions + np.int32(batch.age))

    def _of_entries(self, batch: Batch) -> Draws:
        sequences: list[Sequence] = []
        positions: list[int] = []
        self.row_of = {}
        for entry in batch.scheduled:
            if entry.samples:
                self.row_of[id(entry.sequence)] = len(sequences)
                if entry.drafts:
                    drawn = entry.drawn_positions
                    sequences.extend([entry.sequence] * len(drawn))
                    positions.extend(drawn)
                else:
                    sequences.append(entry.sequence)
                    positions.append(entry.start + entry.num_tokens)
        return Draws(Asked(sequences), np.asarray(positions, np.int32))


def _may_be_processed(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(sampling.logit_bias or sequence.draws_by_history or (sampling.min_tokens and sequence.stop_token_ids))
