"""The seam between the speculator and what guesses tokens. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Protocol

from cluster.engine.sequence import Sequence


class Proposer(Protocol):
    """Guesses the next tokens of running sequences. Keeps what it knows of one until `on_released`."""

    def prepare(self, sequences: ListLike[Sequence]) -> None:
        """Called in each step, with all sequences that decode, before any drafts are asked for. Bounded work
        that makes `offer` possible, such as computing a prompt."""
        ...

    def offer(self, sequence: Sequence, limit: int) -> int:
        """How many of the next tokens it would guess now, at most `limit` >= 1. Cheap.

        Also asked while the newest token is on the device: above 0 then means that the sequence had better
        wait for it, because guesses behind it are likely to be right.
        """
        ...

    def propose(self, granted: ListLike[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """As many tokens for each sequence as it was granted: at most what was offered in this step. There are
        blocks for them."""
        ...

    def on_released(self, sequence: Sequence) -> None:
        """The sequence has lost its blocks: it has ended, or was preempted and may come back."""
        ...

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of the last proposal for the sequence."""
        ...
