"""The mutable state of one request in one engine. Pure Python: the scheduler decides on it.

    position   0 ......... prompt_length ........ len(token_ids) ... num_tokens
               | client's prompt | emitted tokens | pending tokens |
               | num_computed_tokens: KV is stored |
               | num_scheduled_tokens: KV is stored or a launched step will store it |

A pending token was sampled by a launched step whose result the host has not seen yet; it exists only
when the engine runs a step ahead. How many tokens a step with drafts brings is known only when it has
been committed: until then it counts as one pending token, and its drafts as no tokens at all.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_holders import BlockTable
from cluster.types import Request, TokenLogprob

SequenceKey = tuple[str, int]  # (request_id, attempt)


@dataclass(slots=True, weakref_slot=True, eq=False)
class Sequence:
    """Owned by the engine from `add_request` to the terminal event. Compared by identity."""

    request: Request
    token_ids: array[int]  # prompt and emitted tokens, int32
    prompt_length: int  # the client's; emitted tokens begin here
    max_total_tokens: int  # prompt and output together: max_tokens and the context, whichever ends first
    stop_token_ids: frozenset[int]  # end-of-sequence tokens included, unless ignored
    chain: BlockHashChain
    table: BlockTable | None = None  # None while waiting for blocks
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_pending_tokens: int = 0
    num_pending_drafts: int = 0  # in the launched step, which then is the only one that holds rows of this sequence
    num_in_flight: int = 0  # launched steps that hold rows of this sequence
    is_finished: bool = False
    num_cached_tokens: int = 0  # of the prompt, at the first admission
    was_admitted: bool = False
    has_emitted: bool = False
    draws_by_history: bool = False  # the next token depends on which came before, beside through the logits
    draws_plainly: bool = False  # greedily from raw logits, and nothing but the token is asked for
    queued_at: float = 0.0  # these three on the engine's clock, see `timings.py`
    admitted_at: float = 0.0
    first_token_at: float | None = None
    wants_prompt_logprobs: bool = False
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def key(self) -> SequenceKey:
        return self.request.request_id, self.request.attempt

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those still on the device included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Rows that must still be computed before the next token can be drawn; 1 when decoding."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_scheduled_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def can_run(self) -> bool:
        """False while all that is left is to learn tokens which are on the device already, or while it
        waits for them (`needs_pending_tokens`)."""
        num_pending = self.num_pending_tokens
        if num_pending == 0:
            return True
        return len(self.token_ids) + num_pending < self.max_total_tokens and not self.needs_pending_tokens

    @property
    def needs_pending_tokens(self) -> bool:
        """The next step cannot be prepared before the pending tokens are known on the host."""
        return self.num_pending_tokens > 0 and (self.draws_by_history or self.num_pending_drafts > 0)

    @property
    def max_reusable_tokens(self) -> int:
        """How much of a cached prefix may be reused: never the newest token, whose logits are needed,
        and no position whose prompt logprob is still owed."""
        if self.wants_prompt_logprobs and len(self.prompt_logprobs) < self.prompt_length:
            return max(len(self.prompt_logprobs) - 1, 0)
        return len(self.token_ids) - 1


def make_sequence(
    request: Request,
    *,
    block_size: int,
    max_model_len: int,
    eos_token_ids: tuple[int, ...],
    is_loaded: bool,
) -> Sequence:
    """A new sequence for a checked request. `is_loaded`: the prompt's KV was computed elsewhere, and
    with it whatever is owed for the prompt."""
    sampling = request.sampling
    token_ids = array("i", request.token_ids)
    end_of_sequence = () if sampling.ignore_eos else eos_token_ids
    is_continuation = len(token_ids) > request.prompt_length
    wants_prompt_logprobs = sampling.prompt_logprobs is not None and not is_continuation and not is_loaded
    sequence = Sequence(
        request=request,
        token_ids=token_ids,
        prompt_length=request.prompt_length,
        max_total_tokens=min(request.prompt_length + sampling.max_tokens, max_model_len),
        stop_token_ids=frozenset((*end_of_sequence, *sampling.stop_token_ids)),
        chain=BlockHashChain(token_ids, block_size, request.cache_salt),
        wants_prompt_logprobs=wants_prompt_logprobs,
        prompt_logprobs=[None] if wants_prompt_logprobs else [],
        draws_by_history=(
            sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0 or sampling.repetition_penalty != 1.0
        ),
    )
    sequence.draws_plainly = (
        sampling.is_greedy
        and sampling.logprobs is None
        and sampling.min_tokens == 0
        and not sampling.logit_bias
        and not wants_prompt_logprobs
        and not sequence.draws_by_history
    )
    return sequence
