"""The answer to one request as it arrives: server-sent events, their times, their tokens."""

from __future__ import annotations

from array import array

import msgspec

from cluster.bench.http_client import RequestFailed


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


class AnswerStream:
    """A sink for the body of a streamed answer. Times are of `time.perf_counter`.

    A gap is the time between two chunks that carry text. A chunk usually is one token; `num_tokens` is
    what the server's usage says.
    """

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.last_at = 0.0
        self.gaps = array("d")
        self.num_chunks = 0
        self.num_prompt_tokens: int | None = None
        self.num_tokens: int | None = None
        self.finish_reason: str | None = None
        self._error = ""
        self._is_done = False
        self._rest = b""

    def __call__(self, data: bytes, now: float) -> None:
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._on_data(line[5:].strip(), now)

    def check_complete(self) -> None:
        """Raises `RequestFailed` unless the answer came to its regular end."""
        if self._error:
            raise RequestFailed("error_event", self._error)
        if not self._is_done and self.finish_reason is None:
            raise RequestFailed("truncated", "the stream ended without a finish_reason")
        if self.first_at is None:
            raise RequestFailed("empty", "the answer has no text")

    def _on_data(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            self._error = self._error or f"an event that is none of OpenAI's: {error}"
            return
        if event.error is not None:
            self._error = bytes(event.error).decode(errors="replace")[:500]
        for choice in event.choices:
            if _has_text(choice):
                self._on_text(now)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if event.usage is not None:
            self.num_prompt_tokens = event.usage.prompt_tokens
            self.num_tokens = event.usage.completion_tokens

    def _on_text(self, now: float) -> None:
        self.num_chunks += 1
        if self.first_at is None:
            self.first_at = now
        else:
            self.gaps.append(now - self.last_at)
        self.last_at = now


def _has_text(choice: _Choice) -> bool:
    if choice.text:
        return True
    delta = choice.delta
    return delta is not None and bool(delta.content or delta.reasoning_content)
