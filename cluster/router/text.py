"""Text in, text out: prompts to token ids off the event loop, tokens to text one chunk at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import msgspec

from cluster.tokenizer import StopMatcher
from cluster.tokenizer.chat_template import Json
from cluster.types import FinishReason, SamplingParams, TokenChunk, TokenLogprob

INLINE_CHARACTERS = 4096  # shorter texts are tokenised on the event loop: a thread hop costs more
MESSAGE_CHARACTERS = 64  # as many as a message of a chat costs beside its text: many empty ones are work, too
NUM_THREADS = 2

_Result = TypeVar("_Result")


class Detokenizer(Protocol):
    """Bytes of a character may be spread over tokens: text appears when it is complete."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What is still held back, at the end of a sequence."""
        ...


class Codec(Protocol):
    """What the router needs of `cluster.tokenizer.Tokenizer`. Thread-safe."""

    def encode(self, text: str, *, add_special_tokens: bool = ..., max_tokens: int | None = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def detokenizer(self, *, skip_special_tokens: bool = ...) -> Detokenizer: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        add_generation_prompt: bool = ...,
        variables: Mapping[str, Json] | None = ...,
    ) -> str: ...


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk means to a client."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_cached_tokens: int = 0


class ChoiceText:
    """The text of one sequence as it grows. A stop string ends it here, not in the engine."""

    def __init__(
        self, codec: Codec, sampling: SamplingParams, *, skip_special_tokens: bool, include_stop: bool
    ) -> None:
        self._detokenizer = codec.detokenizer(skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(sampling.stop, include_stop=include_stop) if sampling.stop else None
        self._stop_token_ids = sampling.stop_token_ids
        self._min_tokens = sampling.min_tokens
        self._include_stop = include_stop
        self._num_tokens = 0

    def push(self, chunk: TokenChunk) -> Delta:
        """Tokens behind a matched stop string are dropped; the token that completed it is kept."""
        token_ids = chunk.token_ids
        ended_by_token = chunk.finish_reason is FinishReason.STOP
        text = ""
        for position, token_id in enumerate(token_ids):
            self._num_tokens += 1
            is_last = position == len(token_ids) - 1
            if not (is_last and ended_by_token and not self._include_stop):
                text += self._advance(token_id)
            if self._matcher is not None and self._matcher.matched is not None:
                return self._delta(chunk, text, position + 1, FinishReason.STOP, self._matcher.matched)
        if chunk.finish_reason is not None:
            text += self._rest()
            if self._matcher is not None and self._matcher.matched is not None:
                return self._delta(chunk, text, len(token_ids), FinishReason.STOP, self._matcher.matched)
        # as in vLLM, a stop reason is what the client asked for; the model's own end of sequence is none
        stop = chunk.stop_token_id if chunk.stop_token_id in self._stop_token_ids else None
        return self._delta(chunk, text, len(token_ids), chunk.finish_reason, stop)

    def _advance(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        if self._matcher is None or self._num_tokens < self._min_tokens:
            return text
        return self._matcher.push(text)

    def _rest(self) -> str:
        rest = self._detokenizer.flush()
        if self._matcher is None:
            return rest
        shown = self._matcher.push(rest)
        return shown if self._matcher.matched is not None else shown + self._matcher.flush()

    def _delta(
        self, chunk: TokenChunk, text: str, count: int, reason: FinishReason | None, stop: str | int | None
    ) -> Delta:
        return Delta(
            text=text,
            token_ids=chunk.token_ids[:count],
            logprobs=chunk.logprobs[:count],
            finish_reason=reason,
            stop_reason=stop,
            prompt_logprobs=chunk.prompt_logprobs,
            num_cached_tokens=chunk.num_cached_tokens,
        )


class TextService:
    """Tokenises for many requests; long texts in threads, so that streams go on meanwhile. Must be closed."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")

    async def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int | None) -> tuple[int, ...]:
        """Raises `ContextTooLong` when there are more than `max_tokens`."""

        def encode() -> tuple[int, ...]:
            return tuple(self.codec.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens))

        return await self._run(len(text), encode)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        variables: Mapping[str, Json] | None,
        max_tokens: int | None,
    ) -> tuple[int, ...]:
        """The conversation in the model's own template, which writes the special tokens itself."""

        def render_and_encode() -> tuple[int, ...]:
            text = self.codec.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
            return tuple(self.codec.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens))

        size = sum(MESSAGE_CHARACTERS + len(str(message["content"])) for message in messages)
        return await self._run(size, render_and_encode)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self._run(len(token_ids), lambda: self.codec.decode(token_ids, skip_special_tokens=False))

    async def _run(self, size: int, work: Callable[[], _Result]) -> _Result:
        if size <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
