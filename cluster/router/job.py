"""From what a client sent to what workers are asked: defaults, limits, seeds.

ChatRequest | CompletionRequest + prompts as token ids -> Job -> one Request per (prompt, sibling)
"""

from __future__ import annotations

import hashlib
import secrets

import msgspec

from cluster.errors import ContextTooLong, InvalidRequest
from cluster.router.openai import ChatRequest, CompletionRequest
from cluster.types import MAX_TOKENS_LIMIT, Request, SamplingParams, WorkerInfo

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions; a chat may use the whole context
MAX_STOP_STRING_LENGTH = 1024
MAX_CACHE_SALT_LENGTH = 256
SEED_MASK = (1 << 63) - 1


class Prompt(msgspec.Struct, frozen=True):
    """`text` is what the client wrote; None when it sent token ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the answer is written; nothing here changes which tokens are drawn."""

    is_stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False  # write tokens as "token_id:123"
    skip_special_tokens: bool = True
    include_stop: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One checked HTTP request. Choices are numbered prompt by prompt: index = prompt * n + sibling."""

    is_chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    sampling: tuple[SamplingParams, ...]  # parallel to prompts, with the seed of sibling 0
    output: OutputOptions
    echo: bool = False
    discards_output: bool = False  # max_tokens 0: only the prompt's logprobs are wanted
    want_logprobs: bool = False
    cache_salt: bytes = b""
    wants_prompt_logprobs: bool = False  # under its own name; `echo` with logprobs needs them too

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // self.n]

    def request(self, choice: int, job_id: str) -> Request:
        """`job_id` is the router's own; siblings draw from distinct seeds, prompts of a batch from the
        seeds they would have had alone."""
        sampling = self.sampling[choice // self.n]
        return Request(
            request_id=f"{job_id}-{choice}",
            token_ids=self.prompts[choice // self.n].token_ids,
            sampling=msgspec.structs.replace(sampling, seed=sibling_seed(sampling.seed, choice % self.n)),
            cache_salt=self.cache_salt,
        )


def sibling_seed(seed: int, sibling: int) -> int:
    """Sibling 0 has the seed itself, so that n does not change the first choice."""
    if sibling == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sibling}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & SEED_MASK


def chat_job(request: ChatRequest, prompt: Prompt, limits: WorkerInfo) -> Job:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    fitted = fit_max_tokens(
        len(prompt.token_ids), max_tokens, limits.max_model_len, MAX_TOKENS_LIMIT, field, prompt="messages"
    )
    sampling = _sampling(request, fitted, logprobs, request.prompt_logprobs)
    _check(sampling, limits, logprobs_field="top_logprobs")
    return Job(
        is_chat=True,
        prompts=(prompt,),
        sampling=(sampling,),
        want_logprobs=bool(request.logprobs),
        wants_prompt_logprobs=request.prompt_logprobs is not None,
        n=request.n or 1,
        output=_output_options(request),
        cache_salt=_cache_salt(request),
    )


def completion_job(request: CompletionRequest, prompts: tuple[Prompt, ...], limits: WorkerInfo) -> Job:
    discards_output = request.max_tokens == 0 and bool(request.echo)
    wanted = 1 if discards_output else request.max_tokens
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    sampling = []
    base = _sampling(request, 1, request.logprobs, prompt_logprobs)
    for prompt in prompts:
        fitted = fit_max_tokens(
            len(prompt.token_ids), wanted, limits.max_model_len, DEFAULT_COMPLETION_TOKENS, "max_tokens"
        )
        # Not given, a seed is each prompt's own: or one given twice would get one answer twice.
        seed = secrets.randbits(63) if request.seed is None else base.seed
        sampling.append(msgspec.structs.replace(base, max_tokens=fitted, seed=seed))
        _check(sampling[-1], limits, logprobs_field="logprobs")
    return Job(
        is_chat=False,
        prompts=prompts,
        sampling=tuple(sampling),
        echo=bool(request.echo),
        discards_output=discards_output,
        want_logprobs=request.logprobs is not None,
        wants_prompt_logprobs=request.prompt_logprobs is not None,
        n=request.n or 1,
        output=_output_options(request),
        cache_salt=_cache_salt(request),
    )


def fit_max_tokens(
    num_prompt_tokens: int, wanted: int | None, max_model_len: int, default: int, field: str, prompt: str = "prompt"
) -> int:
    """How many tokens may be generated. Raises `ContextTooLong` with both numbers. `field` and `prompt` are the names
    of the request's own fields."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens, the context of this model is {max_model_len} tokens "
            "and must have room for at least one more",
            param=prompt,
        )
    if wanted is None:
        return min(default, room)
    if wanted < 1:
        raise InvalidRequest(f"{field} must be at least 1, got {wanted}", param=field)
    if wanted > room:
        raise ContextTooLong(
            f"{num_prompt_tokens} prompt tokens and {field} {wanted} make {num_prompt_tokens + wanted} tokens, "
            f"the context of this model is {max_model_len} tokens",
            param=field,
        )
    return wanted


def check_prompt_ids(token_ids: tuple[int, ...], limits: WorkerInfo, param: str = "prompt") -> None:
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param=param)
    if len(token_ids) < limits.max_model_len:  # a longer one is refused with both numbers later
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= limits.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequest(f"token id {wrong} is not in the vocabulary (0 to {limits.vocab_size - 1})", param)


def _output_options(request: ChatRequest | CompletionRequest) -> OutputOptions:
    options = request.stream_options
    return OutputOptions(
        is_stream=bool(request.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        return_token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop=bool(request.include_stop_str_in_output),
    )


def _cache_salt(request: ChatRequest | CompletionRequest) -> bytes:
    """A digest, so that its size is bounded and the client's text goes no further."""
    salt = request.cache_salt
    if salt is None:
        return b""
    if not 1 <= len(salt) <= MAX_CACHE_SALT_LENGTH:
        message = f"cache_salt must have 1 to {MAX_CACHE_SALT_LENGTH} characters, got {len(salt)}"
        raise InvalidRequest(message, param="cache_salt")
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def _sampling(
    request: ChatRequest | CompletionRequest, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    seed = secrets.randbits(63) if request.seed is None else _checked_seed(request.seed)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=request.min_tokens or 0,
        temperature=_or(request.temperature, 1.0),
        top_k=0 if request.top_k in (None, -1) else request.top_k,
        top_p=_or(request.top_p, 1.0),
        min_p=_or(request.min_p, 0.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        stop_token_ids=tuple(sorted(set(request.stop_token_ids or ()))),
        stop=_stop_strings(request.stop),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check(sampling: SamplingParams, limits: WorkerInfo, *, logprobs_field: str) -> None:
    try:
        sampling.check(limits.vocab_size)
    except InvalidRequest as error:
        if error.param == "logprobs":
            raise InvalidRequest(error.message.replace("logprobs", logprobs_field, 1), logprobs_field) from error
        raise


def _checked_seed(seed: int) -> int:
    """OpenAI allows signed 64-bit seeds; ours have 63 bits. Different seeds may share a stream only
    across the sign."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise InvalidRequest(f"seed must fit into 64 signed bits, got {seed}", param="seed")
    return seed & SEED_MASK


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    entries = []
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias: keys are token ids, got {key[:64]!r}", param="logit_bias")
        entries.append((int(key), value))
    if len({token_id for token_id, _ in entries}) < len(entries):  # "1" and "01"
        raise InvalidRequest("logit_bias: a token id is given twice", param="logit_bias")
    return tuple(sorted(entries))


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_STRING_LENGTH:
            raise InvalidRequest(
                f"stop: each string must have 1 to {MAX_STOP_STRING_LENGTH} characters, got {len(string)}",
                param="stop",
            )
    return strings
