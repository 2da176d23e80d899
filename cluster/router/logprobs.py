"""Log-probabilities as clients read them, in three formats: chat, legacy completions, vLLM's prompt_logprobs.

The floats are those of the worker: an fp32 value, written as the shortest decimal that reads back as the
same double, so its bits survive JSON. JSON has no minus infinity; -9999.0 stands for it, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.router.text import Codec
from cluster.types import TokenLogprob

NO_PROBABILITY = -9999.0


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class LegacyLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry per token; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int
    decoded_token: str


class LogprobFormat:
    """Writes tokens as text, or as "token_id:123" when a client asked for that."""

    def __init__(self, codec: Codec, *, tokens_as_ids: bool) -> None:
        self._codec = codec
        self._tokens_as_ids = tokens_as_ids

    def chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs(
            [
                ChatLogprob(
                    *self._entry(entry.token_id, entry.logprob),
                    [TopLogprob(*self._entry(token_id, logprob)) for token_id, logprob in entry.top],
                )
                for entry in logprobs
            ]
        )

    def legacy(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], first_offset: int
    ) -> LegacyLogprobs:
        """`logprobs` is parallel to `token_ids`. Offsets count characters of the tokens' own texts."""
        result = LegacyLogprobs([], [], [], [])
        offset = first_offset
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            token = self._token(token_id)
            result.tokens.append(token)
            result.text_offset.append(offset)
            offset += len(token)
            if entry is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            result.token_logprobs.append(finite(entry.logprob))
            top: dict[str, float] = {}
            for other, logprob in entry.top:  # by descending likelihood: tokens may share a text
                top.setdefault(self._token(other), finite(logprob))
            result.top_logprobs.append(top | {token: finite(entry.logprob)})
        return result

    def prompt(self, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, PromptLogprob] | None]:
        """By token id; the prompt's own token is always among them."""
        return [None if entry is None else self._prompt_entry(entry) for entry in logprobs]

    def _prompt_entry(self, entry: TokenLogprob) -> dict[str, PromptLogprob]:
        result = {
            str(token_id): PromptLogprob(finite(logprob), rank, self._token(token_id))
            for rank, (token_id, logprob) in enumerate(entry.top, start=1)
        }
        own = PromptLogprob(finite(entry.logprob), entry.rank, self._token(entry.token_id))
        return {str(entry.token_id): own} | result

    def _entry(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._token(token_id), finite(logprob), list(self._codec.token_bytes(token_id))

    def _token(self, token_id: int) -> str:
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        return self._codec.token_text(token_id)


def finite(logprob: float) -> float:
    return logprob if logprob > NO_PROBABILITY else NO_PROBABILITY
