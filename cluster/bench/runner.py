"""Sends the load and measures it.

open loop    requests leave at their planned times, whether or not earlier ones have been answered
closed loop  each of `concurrency` users sends the next request when the last one has been answered
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator

import msgspec

from cluster.bench.arrivals import arrival_times
from cluster.bench.http_client import HttpClient, RequestFailed
from cluster.bench.measure import RequestRecord
from cluster.bench.options import BenchOptions
from cluster.bench.prompts import Prompt, PromptSource
from cluster.bench.stream import AnswerStream
from cluster.errors import ConfigError

OnRecord = Callable[[RequestRecord, "array[float]"], None]
MAX_WARMUP_CONCURRENCY = 8


class _ModelCard(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


async def find_model(client: HttpClient, options: BenchOptions) -> str:
    """The model to ask for. Raises `ConfigError` if the server cannot be asked."""
    if options.model:
        return options.model
    try:
        models = msgspec.json.decode(await client.fetch("GET", "/v1/models", timeout_s=10.0), type=_ModelList)
    except (RequestFailed, msgspec.DecodeError) as error:
        fix = "is it an OpenAI-compatible server? With `--model` it is not asked what it serves"
        raise ConfigError(f"{options.url}/v1/models: {error}; {fix}") from error
    if not models.data:
        raise ConfigError(f"{options.url} serves no model")
    return models.data[0].id


class Runner:
    """One run. `on_record` gets every measured request as it ends; warm-up requests it does not get."""

    def __init__(
        self, options: BenchOptions, client: HttpClient, model: str, prompts: PromptSource, on_record: OnRecord
    ) -> None:
        self._options = options
        self._client = client
        self._model = model
        self._prompts = prompts
        self._on_record = on_record
        self._rng = random.Random(f"lengths {options.seed}")
        self._path = "/v1/chat/completions" if options.endpoint == "chat" else "/v1/completions"
        self._started_at = 0.0
        self.num_in_flight = 0
        self.num_sent = 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_at if self._started_at else 0.0

    async def warm_up(self) -> None:
        """Raises `RequestFailed` for the first request that fails: measuring on would be of no use."""
        indices = iter(range(self._options.num_warmup))

        async def user() -> None:
            for index in indices:
                record, _ = await self._request(index, 0.0)
                if record.error:
                    raise RequestFailed(record.error, record.message)

        users = min(self._options.concurrency or MAX_WARMUP_CONCURRENCY, MAX_WARMUP_CONCURRENCY)
        await _gather(user() for _ in range(users))
        self.num_sent = 0

    async def run(self) -> None:
        """Until the planned requests have ended. Cancelled, it leaves nothing running; what had ended by
        then has been reported."""
        self._started_at = time.perf_counter()
        if self._options.rate is not None:
            await self._open_loop(self._options.rate)
        else:
            await self._closed_loop(self._options.concurrency or 1)

    async def _closed_loop(self, concurrency: int) -> None:
        indices = self._indices()

        async def user() -> None:
            for index in indices:
                self._on_record(*await self._request(index, 0.0))

        limit = self._options.num_requests or concurrency
        await _gather(user() for _ in range(min(concurrency, limit)))

    async def _open_loop(self, rate: float) -> None:
        times = arrival_times(self._options.arrivals, rate, self._options.seed)
        async with asyncio.TaskGroup() as group:
            for index, planned_s in zip(self._indices(), times, strict=False):
                if self._options.duration_s is not None and planned_s >= self._options.duration_s:
                    return
                await asyncio.sleep(planned_s - self.elapsed_s)
                if self.num_in_flight >= self._options.max_in_flight:
                    self._on_record(self._not_sent(index), array("d"))
                    continue
                group.create_task(self._planned(index, planned_s))

    async def _planned(self, index: int, planned_s: float) -> None:
        self._on_record(*await self._request(index, planned_s))

    def _indices(self) -> Iterator[int]:
        """Of the requests to be sent, up to their number or the end of the time."""
        index = 0
        while self._options.num_requests is None or index < self._options.num_requests:
            if self._options.duration_s is not None and self.elapsed_s >= self._options.duration_s:
                return
            yield index
            index += 1

    async def _request(self, index: int, planned_s: float) -> tuple[RequestRecord, array[float]]:
        stream = AnswerStream()
        body = self._body(self._prompts.next())
        self.num_in_flight += 1
        self.num_sent += 1
        error: RequestFailed | None = None
        sent_at = time.perf_counter()
        try:
            await self._client.call("POST", self._path, body, stream, timeout_s=self._options.request_timeout_s)
            stream.check_complete()
        except RequestFailed as failed:
            error = failed
        finally:
            self.num_in_flight -= 1
        started_s = sent_at - self._started_at if self._started_at else 0.0
        lag_s = max(0.0, started_s - planned_s) if self._options.rate is not None else 0.0
        return _record(index, stream, error, started_s, sent_at, lag_s), stream.gaps

    def _not_sent(self, index: int) -> RequestRecord:
        message = f"{self._options.max_in_flight} requests were in flight already"
        return RequestRecord(index=index, started_s=self.elapsed_s, e2e_s=0.0, error="not_sent", message=message)

    def _body(self, prompt: Prompt) -> bytes:
        options = self._options
        max_tokens = prompt.max_tokens or options.output_tokens.draw(self._rng)
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        if options.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        return msgspec.json.encode(body)


def _record(
    index: int, stream: AnswerStream, error: RequestFailed | None, started_s: float, sent_at: float, lag_s: float
) -> RequestRecord:
    if error is not None or stream.first_at is None:
        failed = error or RequestFailed("empty", "the answer has no text")
        e2e_s = time.perf_counter() - sent_at
        return RequestRecord(
            index=index, started_s=started_s, lag_s=lag_s, e2e_s=e2e_s, error=failed.kind, message=failed.message
        )
    num_tokens = stream.num_chunks if stream.num_tokens is None else stream.num_tokens
    span_s = stream.last_at - stream.first_at
    return RequestRecord(
        index=index,
        started_s=started_s,
        lag_s=lag_s,
        e2e_s=stream.last_at - sent_at,
        ttft_s=stream.first_at - sent_at,
        itl_s=span_s / (num_tokens - 1) if num_tokens > 1 and stream.gaps else None,
        max_itl_s=max(stream.gaps, default=None),
        num_prompt_tokens=stream.num_prompt_tokens or 0,
        num_output_tokens=num_tokens,
        finish_reason=stream.finish_reason,
    )


async def _gather(users: Iterator[Coroutine[None, None, None]]) -> None:
    """All of them, or the first failure; nothing is left running."""
    failure: RequestFailed | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user)
    except* RequestFailed as failures:
        failure = next(error for error in failures.exceptions if isinstance(error, RequestFailed))
    if failure is not None:
        raise failure
