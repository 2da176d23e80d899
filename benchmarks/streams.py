"""Streamed completions whose every end is counted, and a load of them that goes on while a deployment is disturbed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import msgspec

from cluster.verify.model import Case, Output, fp32_bits
from cluster.verify.side import Side


class Streamed(msgspec.Struct, frozen=True):
    output: Output | None  # None: it did not come to its end
    num_ends: int  # finish reasons and errors; one, if all is well


class _Logprobs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...] = ()
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    error: msgspec.Raw | None = None


async def stream(client: httpx.AsyncClient, side: Side, case: Case, salt: str) -> Streamed:
    """One streamed completion with logprobs, `max_tokens` long."""
    body = {
        **{key: value for key, value in msgspec.structs.asdict(case).items() if key != "name"},
        "model": side.model,
        "stream": True,
        "ignore_eos": True,
        "logprobs": 2,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    choices: list[_Choice] = []
    num_errors = 0
    try:
        async with client.stream("POST", f"{side.url}/v1/completions", json=body) as answer:
            num_errors += answer.status_code != httpx.codes.OK
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = msgspec.json.decode(line.removeprefix("data: "), type=_Chunk)
                    choices += chunk.choices
                    num_errors += chunk.error is not None
    except httpx.HTTPError:
        pass  # it has no end then, or had one before
    num_ends = num_errors + sum(choice.finish_reason is not None for choice in choices)
    if num_errors or not choices or choices[-1].finish_reason != "length":
        return Streamed(None, num_ends)
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    output = Output(
        tuple(token for choice in choices for token in choice.token_ids),
        tuple(fp32_bits(value) for part in parts for value in part.token_logprobs),
        tuple(
            tuple(fp32_bits(value) for value in sorted((top or {}).values(), reverse=True))
            for part in parts
            for top in part.top_logprobs
        ),
    )
    return Streamed(output, num_ends)


class Tally(msgspec.Struct):
    """Of streams that ended while the deployment was disturbed."""

    streams: int = 0
    lost: int = 0  # an error, a refusal or no end
    not_one_end: int = 0
    wrong: int = 0  # token ids or logprob bits differ from the undisturbed answer


@asynccontextmanager
async def steady_load(side: Side, cases: Sequence[Case], concurrency: int, timeout_s: float) -> AsyncIterator[Tally]:
    """First every case once, undisturbed. Then `concurrency` streams at any time, with cold caches, until the block is
    left; those that run then are waited for. Raises `RuntimeError` if an undisturbed stream is lost."""
    tally = Tally()
    is_over = asyncio.Event()
    async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
        undisturbed = [(await stream(client, side, case, "undisturbed")).output for case in cases]
        if None in undisturbed:
            raise RuntimeError("a stream was lost before anything was disturbed")
        numbers = itertools.count()

        async def one_after_another() -> None:
            while not is_over.is_set():
                number = next(numbers)
                at = number % len(cases)
                streamed = await stream(client, side, cases[at], f"disturbed-{number}")
                tally.streams += 1
                tally.lost += streamed.output is None
                tally.not_one_end += streamed.num_ends != 1
                tally.wrong += streamed.output is not None and streamed.output != undisturbed[at]

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_another())
            try:
                yield tally
            finally:
                is_over.set()
