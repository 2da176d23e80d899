"""In-memory stand-ins for the router's seams: a byte-level codec and workers that make tokens from arithmetic.

`FakeWorker` implements `WorkerConnection`. Its next token depends on all tokens before it, the seed and
nothing else, so a continuation on another fake gives the tokens of an undisturbed run; it counts what it
holds, so a test can see a leak.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from cluster.errors import HandshakeMismatch, InvalidRequest, Overloaded, TandemError, WorkerLost
from cluster.rpc.base import PrefillEvent
from cluster.tokenizer import IncrementalDetokenizer
from cluster.types import (
    FinishReason,
    HistogramReading,
    PrefillResult,
    Request,
    RequestError,
    Role,
    TokenChunk,
    TokenLogprob,
    WorkerInfo,
    WorkerLoad,
)

EOS = 256
VOCAB_SIZE = 260
Key = tuple[str, int]


class ByteCodec:
    """Token id = byte; 256 is the end-of-sequence token, 257 begins a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        return [*([257] if add_special_tokens else []), *text.encode()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.token_bytes)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if any(message["content"] == "unrenderable" for message in messages):
            raise InvalidRequest("the model's chat template cannot render these messages", param="messages")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """A lower-case letter (so that text is easy to read), from everything before it."""
    return 97 + zlib.crc32(struct.pack(f"<{len(token_ids)}q", *token_ids), seed & 0xFFFFFFFF) % 26


def expected_tokens(prompt: Sequence[int], seed: int, count: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, seed))
    return token_ids[len(prompt) :]


def logprob_of(token_id: int, position: int, count: int) -> TokenLogprob:
    """An fp32 value that has no short decimal."""
    (value,) = struct.unpack("f", struct.pack("f", -0.1 - abs(position) / 7 - token_id / 1e5))
    return TokenLogprob(token_id, value, 1, tuple((token_id + other, value - other) for other in range(count)))


class FakeWorker:
    """One worker process, as a router sees it. Failures are set by the test, by attribute."""

    def __init__(
        self,
        role: Role,
        name: str = "fake",
        *,
        max_model_len: int = 2048,
        step_s: float = 0.0,
        eos_at: int | None = None,
    ) -> None:
        self.role = role
        self.address = name
        self.step_s = step_s  # before each token
        self.eos_at = eos_at  # output position of an end-of-sequence token
        self.prefill_s = 0.0
        self.is_up = True
        self.tokens_per_chunk = 1  # of a decode worker, as one that speculates
        self.accepted_per_position: tuple[int, ...] = ()
        self.dies_at: int | None = None  # output position before which the worker is lost, once
        self.gives_up_at: int | None = None  # output position before which it cancels by itself, once
        self.flips_bit_at: int | None = None  # output position whose logprob is one fp32 step off
        self.error: TandemError | None = None  # answered to everything
        self.mismatch: HandshakeMismatch | None = None  # answered to requests with KV
        self.requests: list[Request] = []
        self.handles: list[bytes | None] = []
        self.running: set[Key] = set()
        self.leased: set[Key] = set()  # prefilled, not yet read or released
        self.released: list[Key] = []
        self.cancelled: list[Key] = []
        self.served: list[Key] = []  # of which nothing more was wanted
        self.counts: Counter[str] = Counter()
        self.is_closed = False
        self.num_drains = 0
        self.num_promised = 0
        self.is_draining = False
        self.histograms: tuple[HistogramReading, ...] = ()
        self.holds_prefill: asyncio.Event | None = None  # prefill waits for it before its end
        self.holds_decode: asyncio.Event | None = None  # decode waits for it before its first chunk
        self.peers: list[FakeWorker] = []  # of which a decode worker reads
        self.info: WorkerInfo | None = WorkerInfo(
            engine_id=f"{name}#1",
            role=role,
            model_name="fake-model",
            model_digest="digest",
            numeric_fingerprint="fingerprint",
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            block_size=16,
            num_blocks=64,
        )

    @property
    def load(self) -> WorkerLoad | None:
        used = len(self.running) + len(self.leased)
        return WorkerLoad(
            num_running=len(self.running),
            num_waiting=0,
            num_free_blocks=64 - used,
            num_blocks=64,
            spec_accepted_tokens=sum(self.accepted_per_position),
            spec_accepted_per_position=self.accepted_per_position,
            histograms=self.histograms,
        )

    @property
    def is_ready(self) -> bool:
        return self.is_up and not self.is_draining

    @property
    def last_error(self) -> str:
        return "" if self.is_up else "connection refused"

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.leased

    @contextmanager
    def promised(self) -> Iterator[None]:
        self.num_promised += 1
        try:
            yield
        finally:
            self.num_promised -= 1

    async def prefill(self, request: Request) -> AsyncGenerator[PrefillEvent, None]:
        key = (request.request_id, request.attempt)
        with self._running(request, None):
            await asyncio.sleep(self.prefill_s)
            if self.holds_prefill is not None:
                await self.holds_prefill.wait()
            first = self._chunk(request, list(request.token_ids), is_first=True)
            self._maybe_die(first.index)
            kv = None if first.finish_reason else repr(key).encode()
            if kv is not None:
                self.leased.add(key)
            self.running.discard(key)  # ended: leaving from here on cancels nothing
            yield PrefillResult(first=self._without_prompt(first), kv=kv, prompt_logprobs=first.prompt_logprobs)

    async def decode(self, request: Request, kv: bytes | None) -> AsyncGenerator[TokenChunk, None]:
        with self._running(request, kv):
            if self.holds_decode is not None:
                await self.holds_decode.wait()
            if kv is not None and self.mismatch is not None:
                yield self._failed(request, self.mismatch)
                return
            if self.is_draining and not self.num_promised:
                yield self._failed(request, Overloaded("this worker is shutting down"))
                return
            for peer in self.peers if kv is not None else ():
                peer.leased.discard((request.request_id, request.attempt))
            token_ids = list(request.token_ids)
            is_first = kv is None
            while True:
                await asyncio.sleep(self.step_s)
                position = len(token_ids) - request.prompt_length
                self._maybe_die(position)
                if self.gives_up_at is not None and position >= self.gives_up_at:
                    self.gives_up_at = None
                    yield self._given_up(request, position)
                    return
                chunk = self._chunk(request, token_ids, is_first=is_first)
                is_first = False
                token_ids.extend(chunk.token_ids)
                while len(chunk.token_ids) < self.tokens_per_chunk and chunk.finish_reason is None:
                    chunk = _joined(chunk, self._chunk(request, token_ids, is_first=False))
                    token_ids.append(chunk.token_ids[-1])
                if chunk.finish_reason is not None:
                    self.running.discard((request.request_id, request.attempt))
                yield chunk
                if chunk.finish_reason is not None:
                    return

    def enough(self, request_id: str, attempt: int) -> None:
        self.served.append((request_id, attempt))

    def release(self, request_id: str, attempt: int) -> None:
        self.released.append((request_id, attempt))
        self.leased.discard((request_id, attempt))

    async def close(self) -> None:
        self.is_closed = True

    def restart(self) -> None:
        """A new process at the same address."""
        assert self.info is not None
        name, _, number = self.info.engine_id.partition("#")
        self.info = WorkerInfo(**{**_fields(self.info), "engine_id": f"{name}#{int(number) + 1}"})
        self.leased.clear()
        self.is_up = True

    @contextmanager
    def _running(self, request: Request, kv: bytes | None) -> Any:
        if not self.is_up:
            raise WorkerLost(f"{self.address} is not connected")
        key = (request.request_id, request.attempt)
        assert key not in self.running, "the same attempt was submitted twice"
        self.requests.append(request)
        self.handles.append(kv)
        self.running.add(key)
        try:
            yield
        except (GeneratorExit, asyncio.CancelledError):
            if key in self.running:
                self.cancelled.append(key)
            raise
        finally:
            self.running.discard(key)

    def _maybe_die(self, position: int) -> None:
        if self.dies_at is not None and position >= self.dies_at:
            self.dies_at = None
            self.is_up = False
            self.leased.clear()
            raise WorkerLost(f"{self.address} was lost")

    def _chunk(self, request: Request, token_ids: list[int], *, is_first: bool) -> TokenChunk:
        if self.error is not None:
            return self._failed(request, self.error)
        sampling = request.sampling
        position = len(token_ids) - request.prompt_length
        is_eos = position == self.eos_at and not sampling.ignore_eos
        token_id = EOS if is_eos else next_token(token_ids, sampling.seed)
        reason = None
        if is_eos or token_id in sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif position + 1 >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        wants_prompt = is_first and sampling.prompt_logprobs is not None
        return TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            index=position,
            token_ids=(token_id,),
            logprobs=() if sampling.logprobs is None else (self._logprob(token_id, position, sampling.logprobs),),
            finish_reason=reason,
            stop_token_id=token_id if token_id in sampling.stop_token_ids else None,
            num_cached_tokens=16 * (request.prompt_length // 16) if is_first else 0,
            prompt_logprobs=_prompt_logprobs(request) if wants_prompt else (),
        )

    def _logprob(self, token_id: int, position: int, count: int) -> TokenLogprob:
        exact = logprob_of(token_id, position, count)
        if position != self.flips_bit_at:
            return exact
        (bits,) = struct.unpack("I", struct.pack("f", exact.logprob))
        (wrong,) = struct.unpack("f", struct.pack("I", bits ^ 1))
        return TokenLogprob(token_id, wrong, 1, exact.top)

    def _without_prompt(self, chunk: TokenChunk) -> TokenChunk:
        return TokenChunk(**{**_fields(chunk), "prompt_logprobs": ()})

    def _given_up(self, request: Request, position: int) -> TokenChunk:
        return TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            index=position,
            token_ids=(),
            finish_reason=FinishReason.CANCELLED,
        )

    def _failed(self, request: Request, error: TandemError) -> TokenChunk:
        return TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            index=0,
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=RequestError(code=error.code, message=error.message),
        )


def _joined(chunk: TokenChunk, later: TokenChunk) -> TokenChunk:
    return msgspec.structs.replace(
        chunk,
        token_ids=chunk.token_ids + later.token_ids,
        logprobs=chunk.logprobs + later.logprobs,
        finish_reason=later.finish_reason,
        stop_token_id=later.stop_token_id,
    )


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...]:
    count = request.sampling.prompt_logprobs or 0
    prompt = request.token_ids[: request.prompt_length]
    return (None, *(logprob_of(token_id, -position, count) for position, token_id in enumerate(prompt[1:], 1)))


def _fields(struct_value: Any) -> dict[str, Any]:
    return {name: getattr(struct_value, name) for name in struct_value.__struct_fields__}
