"""Sequences that decode together, step after step: what stays the same between two steps is kept. Pure Python.

    age 0        the step in which every running sequence had one row; a policy chose it
    age 1, 2 ..  one more row of each, as long as nobody enters, leaves or needs a block that is not there

A cohort is a shortcut of the scheduler, never a decision: the policy would have chosen the same rows. It
lets whoever follows the steps (the scheduler, a runner, its sampler) recognise that the sequences are those
of the step before, in the same order, each one position further.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

from cluster.engine.sequence import Sequence


class Cohort:
    """`starts`: the position of each sequence's row at age 0; from each row a token is drawn. `max_age`: at
    the age after it, some sequence has all the tokens it may have."""

    __slots__ = ("_block_size", "_opening", "age", "max_age", "sequences", "starts")

    def __init__(self, sequences: tuple[Sequence, ...], starts: ListLike[int], block_size: int) -> None:
        self.sequences = sequences
        self.starts = starts
        self.age = 0  # of the newest step
        self.max_age = min(
            sequence.max_total_tokens - start - 2 for sequence, start in zip(sequences, starts, strict=True)
        )
        self._block_size = block_size
        self._opening: dict[int, list[int]] = {}
        for place, start in enumerate(starts):
            self._opening.setdefault(-start % block_size, []).append(place)

    def opening(self, age: int) -> ListLike[int]:
        """Places of the sequences whose row at this age is the first of a block, ascending."""
        return self._opening.get(age % self._block_size, ())

    def advance(self) -> bool:
        """Every sequence gets its next row. True: it reads a token that is still on the device, for all of
        them alike, because they have had all their rows since age 0 in the same steps."""
        self.age += 1
        reads_pending_tokens = self.sequences[0].num_pending_tokens > 0
        for sequence in self.sequences:
            sequence.num_scheduled_tokens += 1
            sequence.num_in_flight += 1
            sequence.num_pending_tokens += 1
        return reads_pending_tokens
