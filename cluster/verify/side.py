"""One deployment as `cluster verify` sees it, and the prompts it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import httpx
import msgspec

from cluster.errors import ConfigError
from cluster.verify.model import Case, Output, VerifyOptions, fp32_bits

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 500, 512, 1000, 1500)
_WORDS = ("river", "stone", "night", "lamp", "paper", "seven", "cloud", "green", "train", "voice", "salt")


class _ModelCard(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _ModelList(msgspec.Struct, frozen=True):
    data: list[_ModelCard]


class _Tokenized(msgspec.Struct, frozen=True):
    tokens: tuple[int, ...]


class _Logprobs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...] | None = None
    logprobs: _Logprobs | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class Side:
    """One deployment."""

    def __init__(self, client: httpx.AsyncClient, url: str, model: str, max_model_len: int | None) -> None:
        self.url = url
        self.model = model
        self.max_model_len = max_model_len
        self._client = client

    @staticmethod
    async def open(client: httpx.AsyncClient, url: str) -> Side:
        models = await _call(client, "GET", f"{url}/v1/models", None, _ModelList)
        if not models.data:
            raise ConfigError(f"{url} serves no model")
        return Side(client, url, models.data[0].id, models.data[0].max_model_len)

    async def tokenize(self, text: str) -> tuple[int, ...]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return (await _call(self._client, "POST", f"{self.url}/tokenize", body, _Tokenized)).tokens

    async def generate(
        self, cases: Sequence[Case], concurrency: int, num_top: int, *, cache_salt: str | None = None
    ) -> tuple[Output, ...]:
        """Outputs in the order of the cases, with at most `concurrency` requests in flight. Cached prefixes
        are shared only between calls with the same `cache_salt`: a new one means a cold cache."""
        gate = asyncio.Semaphore(concurrency)

        async def one(case: Case) -> Output:
            async with gate:
                return await self._complete(case, num_top, cache_salt)

        tasks: list[asyncio.Task[Output]] = []
        failure: ConfigError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks.extend(group.create_task(one(case)) for case in cases)
        except* ConfigError as failures:
            (failure, *_) = (error for error in failures.exceptions if isinstance(error, ConfigError))
        if failure is not None:
            raise failure
        return tuple(task.result() for task in tasks)

    async def _complete(self, case: Case, num_top: int, cache_salt: str | None) -> Output:
        body = {
            "model": self.model,
            "prompt": case.prompt,
            "max_tokens": case.max_tokens,
            "temperature": case.temperature,
            "top_k": case.top_k,
            "top_p": case.top_p,
            "seed": case.seed,
            "ignore_eos": True,
            "logprobs": num_top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # or alternatives with the same text would be one
            "cache_salt": cache_salt,
        }
        completion = await _call(self._client, "POST", f"{self.url}/v1/completions", body, _Completion)
        choice = completion.choices[0]
        if choice.token_ids is None or choice.logprobs is None:
            raise ConfigError(f"{self.url} does not answer token ids (return_token_ids) and logprobs")
        return Output(
            choice.token_ids,
            tuple(map(fp32_bits, choice.logprobs.token_logprobs)),
            tuple(
                tuple(fp32_bits(value) for value in sorted((top or {}).values(), reverse=True))
                for top in choice.logprobs.top_logprobs
            ),
        )


async def built_in_cases(sides: Sequence[Side], options: VerifyOptions) -> tuple[Case, ...]:
    """Prompts of every length at which a block, chunk or split boundary could show; every other one is sampled."""
    context = min((side.max_model_len for side in sides if side.max_model_len is not None), default=max(LENGTHS))
    longest = context - options.max_tokens
    if longest < 1:
        raise ConfigError(f"a context of {context} tokens has no room for {options.max_tokens} generated ones")
    text = " ".join(_WORDS[(index * index + index // 7) % len(_WORDS)] for index in range(2 * max(LENGTHS)))
    token_ids = await sides[0].tokenize(text)
    for side in sides[1:]:
        if await side.tokenize(text) != token_ids:
            raise ConfigError(f"{sides[0].url} and {side.url} tokenise the same text differently: not the same model")
    cases = []
    for index in range(options.num_prompts):
        length = min(LENGTHS[index % len(LENGTHS)], longest, len(token_ids))
        start = (index * 37) % (len(token_ids) - length + 1)
        is_sampled = (index + index // len(LENGTHS)) % 2 == 1
        cases.append(
            Case(
                name=f"{index}: {length} tokens, {'sampled' if is_sampled else 'greedy'}",
                prompt=token_ids[start : start + length],
                max_tokens=options.max_tokens,
                temperature=0.9 if is_sampled else 0.0,
                top_k=50 if index % 4 == 1 else 0,
                top_p=0.95 if is_sampled else 1.0,
                seed=1000 + index,
            )
        )
    return tuple(cases)


async def _call(client: httpx.AsyncClient, method: str, url: str, body: object, kind: type[_Answer]) -> _Answer:
    """Raises `ConfigError` naming the URL for whatever is not the expected answer."""
    content = None if body is None else msgspec.json.encode(body)
    try:
        response = await client.request(method, url, content=content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{url} cannot be reached: {str(error) or type(error).__name__}") from error
    if response.status_code != httpx.codes.OK:
        raise ConfigError(f"{url} answered {response.status_code}: {response.text[:500]}")
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{url} answered something else than expected: {error}") from error
