"""A small model guesses: it draws the next tokens itself, one after the other, k in a row.

It draws with the same noise(seed, position) and the same filters as the target will. Where both models
agree on what is likely, they then draw the same token, also at high temperature: independent draws would
agree only as often as the token is probable.

The draft model has a runner and a KV pool of its own (`draft_kv.py`). It runs on shadows of the sequences,
which share their tokens and blocks and ask for no logprobs; k passes are launched without waiting for the
device, each reading the tokens of the one before as pending ones.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from cluster.engine.batch import Batch, DecodedTokens, ScheduledSequence, StepResult
from cluster.engine.sequence import Sequence
from cluster.engine.speculation.draft_kv import DraftKV

MOST_BEHIND = 2  # tokens without draft KV that a first pass takes: the newest, and the last draft if it was right
MOST_FAILURES = 2  # in a row, before a sequence pauses
LONGEST_PAUSE = 64  # tokens


class DraftRunner(Protocol):
    """What a model runner is to a proposer."""

    def launch(self, batch: Batch) -> Any:
        """Queue a step behind the earlier ones."""
        ...

    def collect(self, step: Any) -> StepResult | DecodedTokens:
        """Wait for a launched step."""
        ...


@dataclass(slots=True)
class _Draftee:
    """What is known of one sequence."""

    shadow: Sequence  # has the sequence's table
    num_failures: int = 0  # proposals in a row of which nothing was accepted
    resume_at: int = 0  # tokens that it must have before it is guessed for again


class DraftModelProposer:
    """A `Proposer` over the runner of the draft model, which nobody else uses."""

    def __init__(self, runner: DraftRunner, kv: DraftKV, *, max_position: int, max_batched_tokens: int) -> None:
        self._runner = runner
        self._kv = kv
        self._max_position = max_position  # the draft model's context, which may be shorter than the target's
        self._max_batched_tokens = max_batched_tokens
        self._draftees: dict[int, _Draftee] = {}  # by identity of the sequence
        self._num_passes = 0

    def prepare(self, sequences: ListLike[Sequence]) -> None:
        """Compute what the draft model has missed, oldest first: prompts, and what was drawn while it paused.
        One pass in a step, of no more rows than a step of the target may have."""
        budget = self._max_batched_tokens
        entries: list[ScheduledSequence] = []
        for sequence in sequences:
            start, end = self._kv.num_stored(sequence), len(sequence.token_ids) - 1
            num_rows = min(end - start, budget)
            if num_rows < MOST_BEHIND or not self._is_ready(sequence, end):
                continue
            entries.append(ScheduledSequence(self._shadow(sequence), start, num_rows, samples=False))
            self._kv.on_computed(sequence, start + num_rows)
            budget -= num_rows
        if entries:
            self._runner.launch(self._batch(entries))  # nothing is drawn, so there is nothing to collect

    def offer(self, sequence: Sequence, limit: int) -> int:
        num_tokens = len(sequence.token_ids)
        if num_tokens - self._kv.num_stored(sequence) > MOST_BEHIND or not self._is_ready(sequence, num_tokens):
            return 0
        return min(limit, self._max_position - num_tokens)

    def propose(self, granted: ListLike[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        drafts: list[list[int]] = [[] for _ in granted]
        launched = []
        for place in range(max(count for _, count in granted)):
            members = [index for index, (_, count) in enumerate(granted) if place < count]
            entries = [self._entry(granted[index][0], place) for index in members]
            launched.append((members, self._runner.launch(self._batch(entries))))
        for members, step in launched:  # the first waits for the device, then all are there
            result = self._runner.collect(step)
            assert isinstance(result, StepResult), "a pass is no cohort's step"
            for index, (token,) in zip(members, result.sampled, strict=True):
                drafts[index].append(token.token_id)
        for (sequence, _), guesses in zip(granted, drafts, strict=True):
            self._kv.on_computed(sequence, len(sequence.token_ids), tuple(guesses[:-1]))
        return [tuple(guesses) for guesses in drafts]

    def on_released(self, sequence: Sequence) -> None:
        """The shadow loses its table, too: a runner may keep what it knows of it until then."""
        self._kv.on_released(sequence)
        draftee = self._draftees.pop(id(sequence), None)
        if draftee is not None:
            draftee.shadow.table = None

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        draftee = self._draftees[id(sequence)]
        draftee.num_failures = 0 if num_accepted else draftee.num_failures + 1
        if draftee.num_failures >= MOST_FAILURES:
            pause = min(1 << draftee.num_failures, LONGEST_PAUSE)
            draftee.resume_at = len(sequence.token_ids) + pause

    def _is_ready(self, sequence: Sequence, position: int) -> bool:
        draftee = self._draftees.get(id(sequence))
        is_paused = draftee is not None and len(sequence.token_ids) < draftee.resume_at
        return not is_paused and position < self._max_position

    def _entry(self, sequence: Sequence, place: int) -> ScheduledSequence:
        """Pass 0 takes what is known, pass `place` the token that the pass before has drawn."""
        end, shadow = len(sequence.token_ids), self._shadow(sequence)
        if place:
            return ScheduledSequence(shadow, end + place - 1, 1, samples=True, reads_pending_token=True)
        start = self._kv.num_stored(sequence)
        return ScheduledSequence(shadow, start, end - start, samples=True)

    def _shadow(self, sequence: Sequence) -> Sequence:
        draftee = self._draftees.get(id(sequence))
        if draftee is None:
            draftee = self._draftees[id(sequence)] = _Draftee(_shadow_of(sequence))
        draftee.shadow.table = sequence.table
        return draftee.shadow

    def _batch(self, entries: list[ScheduledSequence]) -> Batch:
        self._num_passes += 1
        return Batch(self._num_passes, tuple(entries))


def _shadow_of(sequence: Sequence) -> Sequence:
    """Shares the tokens; wants no more of a row than what is drawn from it."""
    sampling = msgspec.structs.replace(sequence.request.sampling, logprobs=None, prompt_logprobs=None)
    request = msgspec.structs.replace(sequence.request, sampling=sampling)
    return replace(sequence, request=request, wants_prompt_logprobs=False)
