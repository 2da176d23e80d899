"""What the scheduler decides for one step, and what the model runner answers. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.sequence import Sequence
from cluster.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Rows `start : start + num_tokens` (absolute positions) of one sequence in this step.

    If the last row is the sequence's newest token, a next token is sampled (`samples`). A row whose
    token is still on the device (sampled by the step before, not yet seen by the host) is taken from
    there: `reads_pending_token`, so a step can be prepared while its predecessor runs.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    reads_pending_token: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, in a fixed order: the order never changes any bits."""

    step: int
    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.scheduled)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The runner's answer for one scheduled sequence that samples."""

    token_id: int
    logprob: TokenLogprob | None
    is_nan: bool = False  # the row's logits held NaN: the request fails, the engine goes on


@dataclass(frozen=True, slots=True)
class StepResult:
    """Parallel to `Batch.scheduled`; None where nothing was sampled."""

    sampled: tuple[SampledToken | None, ...]
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()  # of the rows computed this step
