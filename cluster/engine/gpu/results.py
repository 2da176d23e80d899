"""What a step has brought to the host, as the engine reads it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, repeat

from cluster.engine.batch import Batch, DecodedTokens, SampledToken, StepResult
from cluster.engine.gpu.sampler import DrawnRows, HostLogprobs
from cluster.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The logprobs of an entry's prompt rows, in parts."""

    entry_index: int
    num_top: int
    rows: list[HostLogprobs]


def step_result(batch: Batch, drawn: DrawnRows | None, prompts: list[PromptRows]) -> StepResult | DecodedTokens:
    """Once all of it has arrived."""
    if batch.age > 0 and drawn is not None and not drawn.is_broken_R.any():
        return _decoded_tokens(drawn)
    found: list[tuple[TokenLogprob, ...]] = [()] * len(batch.scheduled)
    for prompt in prompts:
        parts = (part.arrived() for part in prompt.rows)
        found[prompt.entry_index] = tuple(
            row for part in parts for row in part.to_host([prompt.num_top] * len(part.token_ids_R))
        )
    return StepResult(_sampled_tokens(batch, drawn), tuple(found))


def _decoded_tokens(drawn: DrawnRows) -> DecodedTokens:
    token_ids = drawn.token_ids()
    if drawn.logprobs is None:
        return DecodedTokens(token_ids, None)
    logprobs: list[tuple[TokenLogprob, ...]] = [()] * len(token_ids)
    for row, logprob in zip(drawn.logprob_places, drawn.logprobs.arrived().to_host(drawn.num_top), strict=True):
        logprobs[row] = (logprob,)
    return DecodedTokens(token_ids, logprobs)


def _sampled_tokens(batch: Batch, drawn: DrawnRows | None) -> tuple[tuple[SampledToken, ...], ...]:
    """Parallel to the batch's entries, each parallel to its drawn positions."""
    if drawn is None:
        return ((),) * len(batch.scheduled)
    token_ids, is_broken = drawn.token_ids(), drawn.is_broken_R.tolist()
    logprobs = drawn.logprobs.arrived().to_host(drawn.num_top) if drawn.logprobs is not None else []
    places = drawn.logprob_places
    if not places and len(token_ids) == len(batch.scheduled):
        return tuple([(SampledToken(*each),) for each in zip(token_ids, repeat(None), is_broken)])
    rows = [
        SampledToken(token_id, logprobs[places[row]] if row in places and not broken else None, broken)
        for row, (token_id, broken) in enumerate(zip(token_ids, is_broken, strict=True))
    ]
    taken = iter(rows)
    return tuple(tuple(islice(taken, entry.num_drawn)) for entry in batch.scheduled)
