"""What the scheduler decides for one step, and what the model runner answers. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import msgspec

from cluster.engine.cohort import Cohort
from cluster.engine.sequence import Sequence
from cluster.types import TokenLogprob


class DrawnRow(msgspec.Struct, frozen=True, gc=False):  # made for every drawn row of every step
    """One row of logits and what is drawn from it: the token at `position` of `sequence`."""

    sequence: Sequence
    position: int


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):  # made for every row of every step
    """Rows `start : start + num_tokens` (absolute positions) of one sequence in this step.

    If the rows reach the sequence's newest token, a next token is sampled (`samples`). A row whose
    token is still on the device (sampled by the step before, not yet seen by the host) is taken from
    there: `reads_pending_token`, so a step can be prepared while its predecessor runs.

    `drafts` are guesses for the tokens behind the newest. They are the last rows, and a token is
    sampled from each of them, too: if the guess before it was right, it is the sequence's next one.

        newest d1 d2 d3     rows (drafts: d1 d2 d3)
           |   |  |  |
           t1  t2 t3 t4     sampled; t1 always counts, t2 if t1 = d1, t3 if also t2 = d2, ...
    """

    sequence: Sequence
    start: int
    num_tokens: int  # drafts included
    samples: bool
    reads_pending_token: bool = False
    drafts: tuple[int, ...] = ()

    @property
    def num_drawn(self) -> int:
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def drawn_positions(self) -> range:
        """Of the tokens that are sampled; the row before each of them has its logits."""
        end = self.start + self.num_tokens + 1
        return range(end - 1 - len(self.drafts), end) if self.samples else range(0)


class Batch:
    """One step's work, in a fixed order: the order never changes any bits.

    `cohort` is set if the entries are one row of each of its sequences, in its order, from each of which one
    token is drawn: the rows at its `age`. Above age 0 all of them have put out a token before.
    """

    __slots__ = ("_reads_pending_tokens", "_scheduled", "age", "cohort", "num_tokens", "step")

    def __init__(self, step: int, scheduled: tuple[ScheduledSequence, ...], cohort: Cohort | None = None) -> None:
        self.step = step
        self.num_tokens = sum([entry.num_tokens for entry in scheduled])
        self.cohort = cohort
        self.age = 0
        self._scheduled: tuple[ScheduledSequence, ...] | None = scheduled
        self._reads_pending_tokens = False

    @staticmethod
    def of_cohort(step: int, cohort: Cohort, *, reads_pending_tokens: bool) -> Batch:
        """Its next step; the entries are made when somebody asks for them."""
        batch = Batch(step, (), cohort)
        batch.num_tokens = len(cohort.sequences)
        batch.age = cohort.age
        batch._scheduled = None
        batch._reads_pending_tokens = reads_pending_tokens
        return batch

    @property
    def scheduled(self) -> tuple[ScheduledSequence, ...]:
        if self._scheduled is None:
            assert self.cohort is not None
            age, reads = self.age, self._reads_pending_tokens
            rows = zip(self.cohort.sequences, self.cohort.starts, strict=True)
            self._scheduled = tuple([ScheduledSequence(each, start + age, 1, True, reads) for each, start in rows])
        return self._scheduled

    @property
    def is_continued(self) -> bool:
        """The rows are those of the launched step before, each one position further, and their tokens are
        what it draws."""
        return self.age > 0 and self._reads_pending_tokens


def is_decoding(entry: ScheduledSequence) -> bool:
    """Its one row is that of its newest token, which lies behind all whose prompt logprobs may be owed."""
    return entry.num_tokens == 1 and entry.samples


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """The runner's answer for one drawn row."""

    token_id: int
    logprob: TokenLogprob | None
    is_nan: bool = False  # the row's logits held NaN: the request fails, the engine goes on


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """Parallel to `Batch.scheduled`; each entry's sampled tokens are parallel to its `drawn_positions`."""

    sampled: tuple[tuple[SampledToken, ...], ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...]  # of the rows computed this step


class DecodedTokens(msgspec.Struct, frozen=True, gc=False):
    """The answer for a cohort above age 0 whose logits were all sound: one token of each entry, and its logprob,
    or none where it was not asked for. Both are parallel to the cohort."""

    token_ids: ListLike[int]
    logprobs: ListLike[tuple[TokenLogprob, ...]] | None  # None: nobody asked
