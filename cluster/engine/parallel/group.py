"""Groups of ranks: gathers that only move bytes, so they cannot change any bit."""

from __future__ import annotations

from typing import Protocol

import torch


class ParallelGroup(Protocol):
    """The ranks that share one model. The model holds one and calls it between layers."""

    rank: int
    size: int

    def all_gather_columns(self, local_TN: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """(T, sum(widths)): every rank's columns, in rank order. `local_TN` is this rank's part,
        `widths[rank]` wide; T is equal on all ranks. With one rank the input itself is returned."""
        ...

    def gather_expert_rows(
        self, local_TJK: torch.Tensor, experts_TJ: torch.Tensor, counts: tuple[int, ...]
    ) -> torch.Tensor:
        """(T, J, K): each pair's row from the rank that holds its expert. The ranks hold `counts` experts each,
        in rank order. `local_TJK` has this rank's pairs; what it has at others is not moved. `experts_TJ` is
        equal on all ranks. With one rank the input itself is returned."""
        ...


class SingleRank:
    """The group of a model that is not split."""

    rank = 0
    size = 1

    def all_gather_columns(self, local_TN: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        assert widths == (local_TN.shape[1],)
        return local_TN

    def gather_expert_rows(
        self, local_TJK: torch.Tensor, experts_TJ: torch.Tensor, counts: tuple[int, ...]
    ) -> torch.Tensor:
        assert len(counts) == 1
        return local_TJK
