"""Can this engine ever run this request? Asked before anything is allocated."""

from __future__ import annotations

import math

from cluster.errors import ContextTooLong, InvalidRequest
from cluster.types import Request


def check_request(request: Request, *, vocab_size: int, max_model_len: int) -> None:
    """InvalidRequest or ContextTooLong names the field and the numbers. Prompt and output share
    `max_model_len` tokens; a `max_tokens` that reaches beyond ends the output there (LENGTH)."""
    request.sampling.check(vocab_size)
    if request.deadline_s is not None and not 0 < request.deadline_s < math.inf:  # nor is NaN
        raise InvalidRequest(f"deadline_s must be a positive number, got {request.deadline_s}", param="deadline_s")
    num_tokens = len(request.token_ids)
    if num_tokens == 0:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if num_tokens >= max_model_len:
        raise ContextTooLong(
            f"the prompt has {num_tokens} tokens; the context holds {max_model_len}, at least one of them for output",
            param="prompt",
        )
    if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocab_size:
        raise InvalidRequest(f"the prompt has a token id outside of the vocabulary of {vocab_size}", param="prompt")
    if not 0 < request.prompt_length <= num_tokens:
        raise InvalidRequest(
            f"num_prompt_tokens is {request.prompt_length}, token_ids has {num_tokens}", param="num_prompt_tokens"
        )
    num_output_tokens = num_tokens - request.prompt_length
    if num_output_tokens >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"{num_output_tokens} tokens have been generated already, max_tokens is {request.sampling.max_tokens}",
            param="max_tokens",
        )
