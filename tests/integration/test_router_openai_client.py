"""The router spoken to by OpenAI's own Python client, monolithic and split."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from cluster.router.job import sibling_seed
from cluster.types import Role
from tests.fakes import FakeWorker, expected_tokens
from tests.integration.router_harness import MODEL, RunningRouter, running_router

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
CHAT_IDS = list(b"<user>What is the capital of France?")


@pytest.fixture(params=["monolithic", "split", "speculating"])
async def router(request: pytest.FixtureRequest) -> AsyncIterator[RunningRouter]:
    decode = [FakeWorker(Role.DECODE, "d0"), FakeWorker(Role.DECODE, "d1")]
    for worker in decode:
        worker.tokens_per_chunk = 3 if request.param == "speculating" else 1
    prefill = [FakeWorker(Role.PREFILL, "p0"), FakeWorker(Role.PREFILL, "p1")] if request.param == "split" else None
    async with running_router(decode, prefill) as running:
        yield running


@asynccontextmanager
async def client_of(router: RunningRouter) -> AsyncIterator[Any]:
    """Any: the tests also look at fields that OpenAI's types do not have."""
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(prompt: list[int], seed: int, count: int) -> str:
    return bytes(expected_tokens(prompt, seed, count)).decode()


async def test_chat(router: RunningRouter) -> None:
    async with client_of(router) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, seed=7, max_completion_tokens=12)
    choice = answer.choices[0]
    assert choice.message.content == text_of(CHAT_IDS, 7, 12)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (36, 12, 48)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 32


async def test_chat_stream(router: RunningRouter) -> None:
    async with client_of(router) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, seed=7, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text_of(CHAT_IDS, 7, 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    num_events = 12 // router.workers[0].tokens_per_chunk
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (num_events - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_siblings_draw_from_distinct_seeds(router: RunningRouter) -> None:
    async with client_of(router) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, seed=7, max_tokens=8, n=3)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, seed=7, max_tokens=8, n=3, stream=True
        )
        streamed = ["", "", ""]
        async for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [text_of(CHAT_IDS, sibling_seed(7, sibling), 8) for sibling in range(3)]
    assert len(set(texts)) == 3
    assert streamed == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (36, 24)


async def test_chat_logprobs(router: RunningRouter) -> None:
    async with client_of(router) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=CHAT, seed=1, max_tokens=3, logprobs=True, top_logprobs=2
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, seed=1, max_tokens=3, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [entry async for chunk in stream for entry in chunk.choices[0].logprobs.content]
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == list(text_of(CHAT_IDS, 1, 3))
    assert [entry.bytes for entry in entries] == [[token] for token in expected_tokens(CHAT_IDS, 1, 3)]
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    assert streamed == entries


async def test_completion_of_token_ids_with_echo_and_logprobs(router: RunningRouter) -> None:
    async with client_of(router) as client:
        answer = await client.completions.create(
            model=MODEL, prompt=[list(b"abc"), list(b"defg")], seed=3, max_tokens=2, logprobs=1, echo=True
        )
    first, second = answer.choices
    assert first.text == "abc" + text_of(list(b"abc"), 3, 2)
    assert second.text == "defg" + text_of(list(b"defg"), 3, 2)
    assert second.logprobs is not None
    assert second.logprobs.tokens == list(second.text)
    assert second.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in second.logprobs.token_logprobs[1:])
    assert second.logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7


async def test_completion_stream_equals_whole_answer(router: RunningRouter) -> None:
    async with client_of(router) as client:
        whole = await client.completions.create(
            model=MODEL, prompt="Hello", seed=3, max_tokens=5, logprobs=2, echo=True
        )
        stream = await client.completions.create(
            model=MODEL, prompt="Hello", seed=3, max_tokens=5, logprobs=2, echo=True, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        streamed = [entry for chunk in chunks for entry in getattr(chunk.choices[0].logprobs, name)]
        assert streamed == getattr(whole.choices[0].logprobs, name)


async def test_stop_string_cancels_the_worker(router: RunningRouter) -> None:
    full = text_of(list(b"\x01abc"), 5, 40)
    stop = full[6:9]
    async with client_of(router) as client:
        answer = await client.completions.create(model=MODEL, prompt=[1, 97, 98, 99], seed=5, max_tokens=40, stop=stop)
        kept = await client.completions.create(
            model=MODEL,
            prompt=[1, 97, 98, 99],
            seed=5,
            max_tokens=40,
            stop=[stop],
            extra_body={"include_stop_str_in_output": True},
        )
    assert answer.choices[0].text == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert kept.choices[0].text == full[: full.index(stop) + 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == full.index(stop) + 3
    await router.settle()
    for worker in router.workers:
        assert worker.cancelled == worker.served  # it is to count them among the served
    assert sum(len(worker.cancelled) for worker in router.workers) == 2


async def test_stop_token_is_not_shown(router: RunningRouter) -> None:
    token_ids = expected_tokens([1, 2, 3], 5, 30)
    stop = token_ids[4]
    cut = token_ids.index(stop)
    async with client_of(router) as client:
        answer = await client.completions.create(
            model=MODEL,
            prompt=[1, 2, 3],
            seed=5,
            max_tokens=30,
            extra_body={"stop_token_ids": [stop], "return_token_ids": True},
        )
    choice = answer.choices[0]
    assert choice.text == bytes(token_ids[:cut]).decode()
    assert choice.token_ids == token_ids[: cut + 1]
    assert choice.prompt_token_ids == [1, 2, 3]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


async def test_models(router: RunningRouter) -> None:
    async with client_of(router) as client:
        models = await client.models.list()
        one = await client.models.retrieve(MODEL)
        with pytest.raises(openai.NotFoundError, match="'fake-model'"):
            await client.models.retrieve("gpt-5")
    assert [model.id for model in models.data] == [MODEL]
    assert one.max_model_len == 2048
