"""One HTTP completion: its choices run side by side, their deltas become one answer or one stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from cluster.errors import Cancelled, TandemError
from cluster.logs import log_event
from cluster.router.asgi import Reply
from cluster.router.flow import Flow
from cluster.router.job import Job
from cluster.router.logprobs import LogprobFormat
from cluster.router.metrics import RouterMetrics
from cluster.router.responses import Answer, Usage, completion, usage_of
from cluster.router.sse import DONE, ChunkWriter
from cluster.router.text import ChoiceText, Codec, Delta
from cluster.types import FinishReason, TokenChunk

log = logging.getLogger(__name__)

Sink = Callable[[int, Delta], Awaitable[None]]


class Generation:
    """Lives as long as its HTTP request. Everything it starts is over when `run` returns or raises."""

    def __init__(
        self, job: Job, job_id: str, *, flow: Flow, codec: Codec, metrics: RouterMetrics, model: str, session: str
    ) -> None:
        self._job = job
        self._job_id = job_id
        self._flow = flow
        self._codec = codec
        self._metrics = metrics
        self._model = model
        self._session = session
        self._created = int(time.time())
        self._form = LogprobFormat(codec, tokens_as_ids=job.output.tokens_as_ids)
        self._num_cached_tokens = [0] * len(job.prompts)
        self._num_tokens = [0] * job.num_choices

    async def run(self, reply: Reply, *, timeout_s: float) -> None:
        if self._job.output.is_stream:
            await self._stream(reply, timeout_s)
        else:
            await self._whole(reply, timeout_s)

    async def _whole(self, reply: Reply, timeout_s: float) -> None:
        answers = [Answer() for _ in range(self._job.num_choices)]

        async def collect(choice: int, delta: Delta) -> None:
            answers[choice].add(delta)

        await self._run_choices(collect, timeout_s)
        body = completion(
            self._job,
            answers,
            self._form,
            job_id=self._job_id,
            created=self._created,
            model=self._model,
            usage=self._usage(),
        )
        await reply.json(body)

    async def _stream(self, reply: Reply, timeout_s: float) -> None:
        writer = ChunkWriter(self._job, self._form, job_id=self._job_id, created=self._created, model=self._model)
        output = self._job.output

        async def write(choice: int, delta: Delta) -> None:
            usage = self._usage_of_choice(choice) if output.continuous_usage else None
            if event := writer.delta(choice, delta, usage):
                await reply.event(event)

        await self._run_choices(write, timeout_s)
        await reply.end_events((writer.usage(self._usage()) if output.include_usage else b"") + DONE)

    async def _run_choices(self, sink: Sink, timeout_s: float) -> None:
        """One failed sibling fails the request and cancels the others."""
        if self._job.num_choices == 1:
            await self._run_choice(0, sink, timeout_s)
            return
        failure: TandemError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for choice in range(self._job.num_choices):
                    group.create_task(self._run_choice(choice, sink, timeout_s))
        except* TandemError as failures:
            failure = _first(failures)  # raised in here it would come out wrapped in a group
        if failure is not None:
            raise failure

    async def _run_choice(self, choice: int, sink: Sink, timeout_s: float) -> None:
        request = self._job.request(choice, self._job_id)
        output = self._job.output
        text = ChoiceText(
            self._codec,
            request.sampling,
            skip_special_tokens=output.skip_special_tokens,
            include_stop=output.include_stop,
        )
        with _Meter(self._metrics, request.request_id, len(request.token_ids)) as meter:

            async def deliver(chunk: TokenChunk) -> bool:
                delta = text.push(chunk)
                meter.count(delta)
                self._num_tokens[choice] += len(delta.token_ids)
                if delta.num_cached_tokens:
                    self._note_cached(choice, delta.num_cached_tokens)
                await sink(choice, _without_output(delta) if self._job.discards_output else delta)
                return delta.finish_reason is not None

            await self._flow.run(request, deliver, session=self._session, timeout_s=timeout_s)

    def _note_cached(self, choice: int, num_cached_tokens: int) -> None:
        prompt = choice // self._job.n
        self._num_cached_tokens[prompt] = max(self._num_cached_tokens[prompt], num_cached_tokens)

    def _usage(self) -> Usage:
        num_tokens = 0 if self._job.discards_output else sum(self._num_tokens)
        return usage_of(self._job.num_prompt_tokens, num_tokens, sum(self._num_cached_tokens))

    def _usage_of_choice(self, choice: int) -> Usage:
        num_prompt_tokens = len(self._job.prompt_of(choice).token_ids)
        num_tokens = 0 if self._job.discards_output else self._num_tokens[choice]
        return usage_of(num_prompt_tokens, num_tokens, self._num_cached_tokens[choice // self._job.n])


class _Meter:
    """Times one sequence and counts its end, whichever way it ends."""

    def __init__(self, metrics: RouterMetrics, request_id: str, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._num_cached_tokens = 0
        self._reason: FinishReason | None = None
        self._started_at = self._first_at = self._last_at = time.perf_counter()

    def __enter__(self) -> _Meter:
        self._metrics.num_prompt_tokens += self._num_prompt_tokens
        return self

    def count(self, delta: Delta) -> None:
        if delta.token_ids:
            self._time(len(delta.token_ids), time.perf_counter())
        self._num_tokens += len(delta.token_ids)
        self._metrics.num_generation_tokens += len(delta.token_ids)
        self._num_cached_tokens += delta.num_cached_tokens
        self._metrics.num_cached_tokens += delta.num_cached_tokens
        self._reason = delta.finish_reason

    def _time(self, num_tokens: int, now: float) -> None:
        """Tokens that come together share the time since the last ones."""
        if self._num_tokens:
            for _ in range(num_tokens):
                self._metrics.inter_token_latency.observe((now - self._last_at) / num_tokens)
        else:
            self._first_at = now
            self._metrics.time_to_first_token.observe(now - self._last_at)
        self._last_at = now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._reason is not None:
            self._metrics.end_to_end_latency.observe(time.perf_counter() - self._started_at)
            if self._num_tokens > 1:
                span_s = self._last_at - self._first_at
                self._metrics.time_per_output_token.observe(span_s / (self._num_tokens - 1))
            self._metrics.prompt_lengths.observe(self._num_prompt_tokens)
            self._metrics.generation_lengths.observe(self._num_tokens)
            self._end(self._reason)
            return
        gone = isinstance(error, asyncio.CancelledError | Cancelled)
        self._end(FinishReason.CANCELLED if gone else FinishReason.ERROR)

    def _end(self, reason: FinishReason) -> None:
        self._metrics.count_finish(reason)
        log_event(
            log,
            logging.INFO,
            "sequence ended",
            request=self._request_id,
            finish_reason=reason.value,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            tokens=self._num_tokens,
            ttft_s=self._first_at - self._started_at if self._num_tokens else None,
            e2e_s=time.perf_counter() - self._started_at,
        )


def _without_output(delta: Delta) -> Delta:
    """For max_tokens 0: the one token that had to be computed is not shown."""
    return msgspec.structs.replace(
        delta, text="", token_ids=(), logprobs=(), finish_reason=FinishReason.LENGTH, stop_reason=None
    )


def _first(failures: BaseExceptionGroup[TandemError]) -> TandemError:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, TandemError)
    return error
