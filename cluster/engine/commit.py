"""What a finished step means: tokens appended, blocks offered to the prefix cache, sequences ended.

Every accepted sequence gets exactly one terminal event from here. The token that ends a sequence, an
end-of-sequence token or a stop token id, is part of `token_ids` (it was generated, has a logprob, and
counts as usage) and is named in `stop_token_id`, by which the router leaves it out of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import repeat

from cluster.engine.batch import Batch, DecodedTokens, SampledToken, ScheduledSequence, StepResult, is_decoding
from cluster.engine.events import EngineEvent, PromptFinished, PromptProgress, PromptStarted
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence, SequenceKey
from cluster.engine.speculation.acceptance import accepted
from cluster.engine.timings import EngineTimings
from cluster.errors import NumericalError, TandemError
from cluster.types import FinishReason, RequestError, TokenChunk, TokenLogprob

_NextToken = tuple[Sequence, int, tuple[TokenLogprob, ...]]  # with its logprob, if asked for


class Committer:
    """Applies step results to the sequences and collects the events of the engine's next report."""

    def __init__(
        self,
        scheduler: Scheduler,
        sequences: dict[SequenceKey, Sequence],
        timings: EngineTimings,
        *,
        hands_over: bool,
    ) -> None:
        self._scheduler = scheduler
        self._timings = timings
        self._sequences = sequences  # the engine's; ended ones are removed here
        self._hands_over = hands_over
        self._events: list[EngineEvent] = []
        self.num_prompt_tokens = 0  # of prompts whose first token was drawn here
        self.num_generated_tokens = 0

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def drain(self) -> list[EngineEvent]:
        events, self._events = self._events, []
        return events

    def report_started(self, sequence: Sequence) -> None:
        if not self._hands_over:
            return
        table, (request_id, attempt) = sequence.table, sequence.key
        assert table is not None
        generations = self._scheduler.blocks.generations
        self._events.append(
            PromptStarted(
                request_id,
                attempt,
                len(sequence.token_ids),
                tuple(table.block_ids),
                tuple(generations[block] for block in table.block_ids),
                table.num_cached_tokens,
            )
        )

    def commit(self, batch: Batch, result: StepResult | DecodedTokens, now: float) -> None:
        """`now` is when the result was known, on the engine's clock."""
        if isinstance(result, DecodedTokens):
            assert batch.cohort is not None
            assert batch.age > 0
            none: Iterable[tuple[TokenLogprob, ...]] = repeat(())
            self._commit_next(zip(batch.cohort.sequences, result.token_ids, result.logprobs or none, strict=False), now)
            return
        next_tokens: list[_NextToken] = []  # of entries in a row: events stay in the order of the entries
        for index, entry in enumerate(batch.scheduled):
            sequence, sampled = entry.sequence, result.sampled[index]
            if self._draws_next(entry, sampled):
                token = sampled[0]
                next_tokens.append((sequence, token.token_id, () if token.logprob is None else (token.logprob,)))
                continue
            self._commit_next(next_tokens, now)
            next_tokens.clear()
            sequence.num_in_flight -= 1
            sequence.num_pending_tokens -= entry.samples
            if entry.drafts:
                sequence.num_pending_drafts = 0
            if sequence.is_finished:
                self._release_finished(sequence)
            else:
                self._commit_entry(entry, sampled, result.prompt_logprobs[index], now)
        self._commit_next(next_tokens, now)

    def _draws_next(self, entry: ScheduledSequence, sampled: tuple[SampledToken, ...]) -> bool:
        """One sound token behind the first one, from a row that owes nothing else: most of all entries."""
        return is_decoding(entry) and entry.sequence.has_emitted and not self._hands_over and not sampled[0].is_nan

    def _commit_next(self, next_tokens: Iterable[_NextToken], now: float) -> None:
        """`_commit_entry` of many that `_draws_next`."""
        events, blocks = self._events, self._scheduler.blocks
        block_size = blocks.block_size
        for sequence, token_id, logprobs in next_tokens:
            sequence.num_in_flight -= 1
            sequence.num_pending_tokens -= 1
            if sequence.is_finished:
                self._release_finished(sequence)
                continue
            known = sequence.token_ids
            sequence.num_computed_tokens = num_stored = len(known)
            known.append(token_id)
            if num_stored % block_size == 0:
                assert sequence.table is not None
                blocks.register_computed(sequence.table, sequence.chain, num_stored)
            self.num_generated_tokens += 1
            if num_stored + 1 >= sequence.max_total_tokens or token_id in sequence.stop_token_ids:
                tokens = (SampledToken(token_id, logprobs[0] if logprobs else None),)
                self._end_regularly(sequence, self._make_chunk(sequence, tokens), now)
                continue
            request = sequence.request
            events.append(
                TokenChunk(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    index=num_stored - sequence.prompt_length,
                    token_ids=(token_id,),
                    logprobs=logprobs,
                )
            )

    def _release_finished(self, sequence: Sequence) -> None:
        """It ended while this step was on its way."""
        if sequence.num_in_flight == 0:
            self._scheduler.release_blocks(sequence)

    def _commit_entry(
        self,
        entry: ScheduledSequence,
        drawn: tuple[SampledToken, ...],
        prompt_logprobs: tuple[TokenLogprob, ...],
        now: float,
    ) -> None:
        sequence = entry.sequence
        drawn = accepted(entry.drafts, drawn)
        if entry.drafts and self._scheduler.speculator is not None:
            self._scheduler.speculator.on_verified(sequence, len(entry.drafts), len(drawn) - 1)
        is_broken = any(math.isnan(each.logprob) for each in prompt_logprobs) or any(each.is_nan for each in drawn)
        if is_broken and len(drawn) <= 1:
            self._end_broken(sequence)
            return
        sequence.prompt_logprobs.extend(prompt_logprobs)
        tokens = _until_stop(sequence, drawn)
        self._advance(entry, tokens)
        if tokens:
            self._report(sequence, tokens, now)
        if is_broken and not sequence.is_finished:
            self._end_broken(sequence)

    def end(self, sequence: Sequence, reason: FinishReason, error: TandemError | None = None) -> None:
        """End a sequence without a further token."""
        request_id, attempt = sequence.key
        chunk = TokenChunk(
            request_id=request_id,
            attempt=attempt,
            index=sequence.num_output_tokens,
            token_ids=(),
            finish_reason=reason,
            error=RequestError(code=error.code, message=error.message) if error is not None else None,
        )
        self._leave(sequence)
        self._events.append(PromptFinished(chunk, None) if self._hands_over else chunk)

    def _advance(self, entry: ScheduledSequence, tokens: tuple[SampledToken, ...]) -> None:
        """Append what was drawn. The KV of all tokens but the newest is stored then; a row whose draft was
        wrong, or which lies behind the end, does not count: its block is never offered to others."""
        sequence = entry.sequence
        assert sequence.table is not None
        sequence.token_ids.extend(each.token_id for each in tokens)
        num_void_rows = len(entry.drawn_positions) - len(tokens)
        sequence.num_computed_tokens = entry.start + entry.num_tokens - num_void_rows
        self._scheduler.blocks.register_computed(sequence.table, sequence.chain, sequence.num_computed_tokens)
        if entry.drafts:
            self._scheduler.settle_drafts(entry)
        if self._hands_over:
            self._events.append(PromptProgress(*sequence.key, sequence.num_computed_tokens))

    def _report(self, sequence: Sequence, tokens: tuple[SampledToken, ...], now: float) -> None:
        self.num_generated_tokens += len(tokens)
        self._timings.on_tokens(sequence, len(tokens), now)
        chunk = self._make_chunk(sequence, tokens)
        if self._hands_over:
            self._timings.on_end(sequence, now, hands_over=True)
            self._hand_over(sequence, chunk)
        elif chunk.finish_reason is not None:
            self._end_regularly(sequence, chunk, now)
        else:
            self._events.append(chunk)

    def _end_regularly(self, sequence: Sequence, chunk: TokenChunk, now: float) -> None:
        self._timings.on_end(sequence, now, hands_over=False)
        self._leave(sequence)
        self._events.append(chunk)

    def _make_chunk(self, sequence: Sequence, tokens: tuple[SampledToken, ...]) -> TokenChunk:
        request_id, attempt = sequence.key
        newest = sequence.token_ids[-1]
        stops = newest in sequence.stop_token_ids
        ends = len(sequence.token_ids) >= sequence.max_total_tokens
        is_first = not sequence.has_emitted
        if is_first:
            sequence.has_emitted = True
            self.num_prompt_tokens += sequence.prompt_length
        return TokenChunk(
            request_id=request_id,
            attempt=attempt,
            index=sequence.num_output_tokens - len(tokens),
            token_ids=tuple(each.token_id for each in tokens),
            logprobs=tuple(each.logprob for each in tokens if each.logprob is not None),
            finish_reason=FinishReason.STOP if stops else FinishReason.LENGTH if ends else None,
            stop_token_id=newest if stops else None,
            num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and not self._hands_over else (),
        )

    def _hand_over(self, sequence: Sequence, chunk: TokenChunk) -> None:
        """The KV of all tokens but the newest is stored; it stays readable under a lease."""
        assert sequence.num_computed_tokens == len(sequence.token_ids) - 1
        lease = None
        if chunk.finish_reason is None:
            assert sequence.table is not None
            lease = self._scheduler.blocks.pin(sequence.table, sequence.num_computed_tokens)
        self._leave(sequence)
        self._events.append(PromptFinished(chunk, lease, tuple(sequence.prompt_logprobs)))

    def _end_broken(self, sequence: Sequence) -> None:
        """NaN in the logits: nobody else may find this KV in the prefix cache."""
        assert sequence.table is not None
        self._scheduler.blocks.forget_content(sequence.table)
        message = f"the model's output for position {len(sequence.token_ids)} is not a number"
        self.end(sequence, FinishReason.ERROR, NumericalError(message))

    def _leave(self, sequence: Sequence) -> None:
        sequence.is_finished = True
        self._scheduler.leave(sequence)
        del self._sequences[sequence.key]


def _until_stop(sequence: Sequence, drawn: tuple[SampledToken, ...]) -> tuple[SampledToken, ...]:
    """The tokens that were drawn up to the first that ends the sequence, or to one that is not a number."""
    tokens: list[SampledToken] = []
    for each in drawn:
        if each.is_nan:
            break
        tokens.append(each)
        if each.token_id in sequence.stop_token_ids:
            break
    assert len(sequence.token_ids) + len(tokens) <= sequence.max_total_tokens, "drafts stay within the limits"
    return tuple(tokens)
