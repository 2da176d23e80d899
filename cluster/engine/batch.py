"""What the scheduler decides for one step, and what the model runner answers. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from cluster.engine.sequence import Sequence
from cluster.types import TokenLogprob


class DrawnRow(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, in a fixed order: the order never changes any bits."""

    step: int
    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)

    @property
    def is_decode(self) -> bool:
        """Every entry is one row from which one token is drawn, and nothing else."""
        return all(
            entry.num_tokens == 1 and entry.samples and not entry.sequence.wants_prompt_logprobs
            for entry in self.scheduled
        )


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """The runner's answer for one drawn row."""

    token_id: int
    logprob: TokenLogprob | None
    is_nan: bool = False  # the row's logits held NaN: the request fails, the engine goes on


@dataclass(frozen=True, slots=True)
class StepResult:
    """Parallel to `Batch.scheduled`; each entry's sampled tokens are parallel to its `drawn_positions`."""

    sampled: tuple[tuple[SampledToken, ...], ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # of the rows computed this step
