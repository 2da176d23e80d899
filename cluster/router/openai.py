"""What clients send: the request bodies of the OpenAI API, with the additions vLLM's clients use.

    body bytes -> decode_body -> ChatRequest | CompletionRequest | ... (checked) -> job.py -> Request

Unknown fields are ignored, clients send many. A field that is known here but cannot be honoured is
refused by name when ignoring it would change the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from cluster.errors import InvalidRequest
from cluster.tokenizer.chat_template import Json

_Body = TypeVar("_Body", bound=msgspec.Struct)
_PATH = re.compile(r" - at `\$\.?([^`]*)`")
ROLES = ("system", "developer", "user", "assistant")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both endpoints have. `None` stands for "not given" as in OpenAI's API."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # -1 and 0: off
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None  # prompts share cached prefixes only with prompts of the same salt

    # Known, but not to be had: see `refused_fields`.
    kv_transfer_params: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    response_format: ResponseFormat | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    logits_processors: Any = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_embeds: Any = None
    vllm_xargs: Any = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    documents: list[Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None  # switches of the model's template
    continue_final_message: bool | None = None
    echo: bool | None = None
    reasoning_effort: str | None = None
    web_search_options: Any = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None


def decode_body(body: bytes, kind: type[_Body]) -> _Body:
    """Raise `InvalidRequest` for what is no UTF-8, no JSON, or has a field of a wrong type (named)."""
    try:
        body.decode()  # msgspec looks only into the strings it keeps
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 (byte {error.start})") from error
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the request body is nested too deeply") from error


def _wrong_type(message: str) -> InvalidRequest:
    found = _PATH.search(message)
    if found is None or not found.group(1):
        missing = re.search(r"missing required field `(\w+)`", message)
        return InvalidRequest(message, param=missing.group(1) if missing else None)
    path = found.group(1)
    return InvalidRequest(f"{path}: {_PATH.sub('', message)}", param=re.split(r"[.\[]", path)[0])


def check_supported(request: ChatRequest | CompletionRequest) -> None:
    """Raise `InvalidRequest` naming the first field that cannot be honoured."""
    if request.kv_transfer_params is not None:
        raise InvalidRequest("kv_transfer_params is internal and not accepted from clients", param="kv_transfer_params")
    own = _refused_chat_fields(request) if isinstance(request, ChatRequest) else _refused_completion_fields(request)
    for field, is_set in (*_refused_common_fields(request), *own):
        if is_set:
            raise InvalidRequest(f"{field} is not supported by this server", param=field)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    n = 1 if request.n is None else request.n
    if n < 1:
        raise InvalidRequest(f"n must be at least 1, got {n}", param="n")
    if request.best_of is not None and request.best_of != n:
        raise InvalidRequest("best_of other than n is not supported by this server", param="best_of")


def _refused_common_fields(request: SamplingFields) -> Iterator[tuple[str, bool]]:
    for field in (
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("logits_processors", "truncate_prompt_tokens", "prompt_embeds", "vllm_xargs"),
    ):
        yield field, getattr(request, field) is not None
    yield "response_format", request.response_format is not None and request.response_format.type != "text"
    yield "use_beam_search", bool(request.use_beam_search)
    yield "bad_words", bool(request.bad_words)
    yield "allowed_token_ids", request.allowed_token_ids is not None


def _refused_chat_fields(request: ChatRequest) -> Iterator[tuple[str, bool]]:
    # With tool_choice "none" a model may see its tools or not; without a call parser they must not be shown.
    yield "tools", bool(request.tools) and request.tool_choice != "none"
    yield "tool_choice", request.tool_choice not in (None, "none", "auto")
    yield "functions", bool(request.functions)
    yield "function_call", request.function_call not in (None, "none", "auto")
    yield "modalities", request.modalities is not None and request.modalities != ["text"]
    yield "documents", bool(request.documents)
    for field in ("audio", "chat_template", "reasoning_effort", "web_search_options"):
        yield field, getattr(request, field) is not None
    yield "continue_final_message", bool(request.continue_final_message)
    yield "echo", bool(request.echo)


def _refused_completion_fields(request: CompletionRequest) -> Iterator[tuple[str, bool]]:
    yield "suffix", bool(request.suffix)


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Json]]:
    """The messages as a chat template takes them. Raises `InvalidRequest` naming the message."""
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: ChatMessage) -> dict[str, Json]:
    where = f"messages[{index}]"
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise InvalidRequest(f"{where}: tool calls are not supported by this server", param="messages")
    if message.role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, got {message.role[:64]!r}", "messages")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing", param="messages")
    plain: dict[str, Json] = {"role": message.role, "content": _plain_content(where, message.content)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _plain_content(where: str, content: str | list[ContentPart]) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"{where}.content[{index}]: only parts of type text are supported, got {part.type[:64]!r}",
                param="messages",
            )
    return "\n".join(part.text or "" for part in content)
