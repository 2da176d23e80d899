"""Prompts: of a wanted number of tokens, or from a file.

Synthetic prompts are made of words that are one token each behind a space. Whether they are is asked of
the server's /tokenize (Tandem, vLLM); without it one token per word is assumed, and the report shows what
the server has counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.bench.http_client import HttpClient, RequestFailed
from cluster.bench.options import BenchOptions
from cluster.errors import ConfigError

_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from which one had all "
    "were when we there can an your more other time new some could these two may first then any like now such our "
    "over man even most after also made many before must through back years where much way well down should "
    "because each just those people how too little state good very make world still own see men work long get "
    "here between both life being under never day same another know while last might us great old year off come "
    "since against go came right used take three"
)
WORDS = tuple(_WORDS.split())
MAX_FILE_BYTES = 1 << 30


class Prompt(msgspec.Struct, frozen=True):
    """`num_tokens` is what was asked for; None: a file does not say."""

    text: str
    num_tokens: int | None = None
    max_tokens: int | None = None  # None: drawn from the options


class PromptSource(Protocol):
    def next(self) -> Prompt: ...


class _Tokenized(msgspec.Struct):
    count: int


class SyntheticPrompts:
    """Random words, so that no prompt is a prefix of another one."""

    def __init__(self, options: BenchOptions, words: tuple[str, ...], overhead: int) -> None:
        self._lengths = options.prompt_tokens
        self._words = words
        self._overhead = overhead  # tokens that every prompt has beside its words (BOS, chat template)
        self._rng = random.Random(f"prompts {options.seed}")

    def next(self) -> Prompt:
        num_tokens = self._lengths.draw(self._rng)
        num_words = max(1, num_tokens - self._overhead)
        return Prompt(" " + " ".join(self._rng.choices(self._words, k=num_words)), num_tokens)


class _Line(msgspec.Struct):
    prompt: str
    max_tokens: int | None = None


class FilePrompts:
    """JSON lines with `prompt` and perhaps `max_tokens`, or plain text, a prompt per line; from the
    beginning again when it ends."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` naming the line."""
        self._prompts = list(_read(path))
        if not self._prompts:
            raise ConfigError(f"{path} holds no prompt")
        self._index = -1

    def next(self) -> Prompt:
        self._index = (self._index + 1) % len(self._prompts)
        return self._prompts[self._index]


def _read(path: Path) -> Iterator[Prompt]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has more than {MAX_FILE_BYTES >> 20} MiB")
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield Prompt(line)
            continue
        try:
            entry = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not entry.prompt or (entry.max_tokens is not None and entry.max_tokens < 1):
            raise ConfigError(f"{path}, line {number}: prompt must not be empty, max_tokens must be at least 1")
        yield Prompt(entry.prompt, None, entry.max_tokens)


async def prompt_source(client: HttpClient, options: BenchOptions, model: str) -> tuple[PromptSource, bool]:
    """And whether lengths are exact."""
    if options.prompt_file is not None:
        return FilePrompts(options.prompt_file), True
    try:
        words = [word for word in WORDS if await _grows_by_one(client, model, word)]
        if len(words) < 2:
            return SyntheticPrompts(options, WORDS, 0), False
        overhead = await _count(client, model, " " + words[0], is_chat=options.endpoint == "chat") - 1
    except (RequestFailed, msgspec.DecodeError):  # this server has no /tokenize
        return SyntheticPrompts(options, WORDS, 0), False
    return SyntheticPrompts(options, tuple(words), overhead), True


async def _grows_by_one(client: HttpClient, model: str, word: str) -> bool:
    """A second occurrence adds exactly one token, whatever the first one brings with it."""
    once = await _count(client, model, f" {word}", is_chat=False)
    return await _count(client, model, f" {word} {word}", is_chat=False) == once + 1


async def _count(client: HttpClient, model: str, text: str, *, is_chat: bool) -> int:
    body: dict[str, object] = {"model": model}
    body |= {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    answer = await client.fetch("POST", "/tokenize", msgspec.json.encode(body))
    return msgspec.json.decode(answer, type=_Tokenized).count
