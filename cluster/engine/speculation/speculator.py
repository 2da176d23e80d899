"""Who gets how many drafts: asks the proposer, grows blocks, learns from what was accepted. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from cluster.engine.block_manager import BlockManager
from cluster.engine.sequence import Sequence
from cluster.engine.speculation.proposer import Proposer

FIRST_LENGTH = 4  # drafts of a sequence of which nothing is known yet


@dataclass(slots=True)
class SpeculationCounts:
    """Since the engine started."""

    accepted_per_position: list[int]  # by place among the drafts of a step
    num_drafts: int = 0  # proposals: one per sequence and step
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class Speculator:
    """One per engine that speculates. `max_tokens`: the most drafts of a sequence in a step.

    A sequence's next proposal has twice as many drafts as were accepted of the last one, so guesses that
    come true reach `max_tokens` in a few steps and wrong ones soon cost one row.
    """

    proposer: Proposer
    max_tokens: int
    counts: SpeculationCounts = field(init=False)
    _lengths: dict[int, int] = field(default_factory=dict)  # by identity of a sequence that has blocks

    def __post_init__(self) -> None:
        self.counts = SpeculationCounts([0] * self.max_tokens)

    def awaits_token(self, sequence: Sequence) -> bool:
        """Whether a sequence whose newest token is on the device had better wait for it: a lookup without
        it has found how the text may go on. Otherwise it goes on a step ahead and loses nothing."""
        limit = self._limit(sequence)
        return limit > 0 and self.proposer.offer(sequence, limit) > 0

    def propose(
        self, decoding: ListLike[Sequence], blocks: BlockManager, budget: int, *, keep_free: int
    ) -> list[tuple[int, ...]]:
        """Drafts for each of `decoding`, `budget` in all, and room for them in its table. New blocks are
        taken only while `keep_free` remain: what does not fit is not proposed."""
        candidates = [sequence for sequence in decoding if not sequence.draws_by_history]
        self.proposer.prepare(candidates)
        share = max(budget // max(len(candidates), 1), 1)
        granted: list[tuple[Sequence, int]] = []
        for sequence in candidates:
            limit = 0 if sequence.num_pending_tokens else min(self._limit(sequence), share, budget)
            offered = self.proposer.offer(sequence, limit) if limit > 0 else 0
            count = _with_room(sequence, offered, blocks, keep_free)
            if count > 0:
                granted.append((sequence, count))
                budget -= count
        proposals = self.proposer.propose(granted) if granted else []
        drafts_of = {id(sequence): drafts for (sequence, _), drafts in zip(granted, proposals, strict=True)}
        return [drafts_of.get(id(sequence), ()) for sequence in decoding]

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        counts = self.counts
        counts.num_drafts += 1
        counts.num_draft_tokens += num_drafts
        counts.num_accepted_tokens += num_accepted
        for place in range(num_accepted):
            counts.accepted_per_position[place] += 1
        length = max(min(2 * num_accepted, self.max_tokens), 1)
        if num_accepted == num_drafts:  # it may have been given fewer than it wanted
            length = max(length, self._lengths.get(id(sequence), 0))
        self._lengths[id(sequence)] = length
        self.proposer.on_verified(sequence, num_drafts, num_accepted)

    def on_released(self, sequence: Sequence) -> None:
        """The sequence has lost its blocks: it has ended, or was preempted and may come back."""
        self._lengths.pop(id(sequence), None)
        self.proposer.on_released(sequence)

    def _limit(self, sequence: Sequence) -> int:
        """Drafts that may be useful: one more token is drawn behind the last, and it must be within the
        limits of the sequence."""
        if sequence.draws_by_history:
            return 0
        wanted = self._lengths.get(id(sequence)) or min(FIRST_LENGTH, self.max_tokens)
        return min(wanted, sequence.max_total_tokens - sequence.num_tokens - 1)


def _with_room(sequence: Sequence, count: int, blocks: BlockManager, keep_free: int) -> int:
    """How many of `count` drafts the sequence's table has room for, after growing it if blocks are plenty."""
    table = sequence.table
    assert table is not None
    if count <= 0 or blocks.grow(table, sequence.num_tokens + count, keep_free):
        return count
    return min(count, len(table.block_ids) * blocks.block_size - sequence.num_tokens)
