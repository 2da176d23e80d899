"""What an engine reports from `step()`, in the order in which it happened.

A policy that keeps its sequences (decode) makes TokenChunks only. A policy that hands over (prefill)
makes, per request: PromptStarted once, PromptProgress after each chunk, then exactly one
PromptFinished; a request that fails early has the PromptFinished alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.block_holders import Lease
from cluster.types import TokenChunk, TokenLogprob


@dataclass(frozen=True, slots=True)
class PromptStarted:
    """Blocks are allocated; a peer may begin to read what becomes ready. The first
    `num_cached_tokens` are ready already."""

    request_id: str
    attempt: int
    num_tokens: int
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The KV of the first `num_computed_tokens` tokens is stored."""

    request_id: str
    attempt: int
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class PromptFinished:
    """The terminal event of a request on an engine that hands over.

    `lease` holds the blocks of all tokens but the one in `chunk`; whoever takes the event owns it and
    must give it to `Engine.release`. None if `chunk` ends the request: nothing is held.
    """

    chunk: TokenChunk
    lease: Lease | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


EngineEvent = PromptStarted | PromptProgress | PromptFinished | TokenChunk
