"""Rendering a model's own chat template, in a sandbox with limits.

A template comes with the model, never with a request. It is still somebody's program that runs on
text of strangers: it may not reach Python objects, and its time and its output are bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import InvalidRequest, ModelError

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

_MAX_TEMPLATE_CHARACTERS = 1 << 20
_MAX_OUTPUT_CHARACTERS = 16 << 20
_TIME_LIMIT_S = 2.0
_MAX_FACTOR = 1 << 63
# What pads a text to any width: a few characters of template would fill the memory.
_PADDING_FILTERS = ("center", "indent")
_PADDING_METHODS = frozenset({"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs"})
_MAX_PADDING = 256
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_output_characters: int = _MAX_OUTPUT_CHARACTERS,
        time_limit_s: float = _TIME_LIMIT_S,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` are variables such as `bos_token`. Raises `ModelError` if it cannot be parsed."""
        if len(source) > _MAX_TEMPLATE_CHARACTERS:
            raise ModelError(f"the chat template has {len(source)} characters, at most {_MAX_TEMPLATE_CHARACTERS}")
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._max_output_characters = max_output_characters
        self._time_limit_s = time_limit_s
        self._now = now
        try:
            self._code = self._environment(0.0).compile(source)
        except (TemplateError, RecursionError) as error:
            raise ModelError(f"the model's chat template cannot be parsed: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        tools: Sequence[Mapping[str, Json]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Json] | None = None,
    ) -> str:
        """The prompt. `variables` are extra switches such as Qwen's `enable_thinking`.

        Raises `InvalidRequest`: messages malformed, refused by the template, or over a limit.
        """
        for name in variables or {}:
            if name in _RESERVED or name in self._special_tokens:
                raise InvalidRequest(f"{name!r} cannot be set for the chat template", param="chat_template_kwargs")
        environment = self._environment(time.monotonic() + self._time_limit_s)
        template = environment.template_class.from_code(environment, self._code, environment.globals)
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": [_checked_message(message, index) for index, message in enumerate(_not_empty(messages))],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in template.generate(values):
                num_characters += len(piece)
                if num_characters > self._max_output_characters:
                    raise InvalidRequest("the rendered chat is too long", param="messages")
                environment.check_time()
                pieces.append(piece)
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            message = f"the model's chat template cannot render these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        return "".join(pieces)

    def _environment(self, deadline: float) -> _LimitedEnvironment:
        environment = _LimitedEnvironment(deadline, self._max_output_characters)
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  # declared as an instance variable by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """One rendering. Every call, lookup and product a template makes passes here."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, deadline: float, max_characters: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
        self._deadline = deadline
        self._max_characters = max_characters
        for name in _PADDING_FILTERS:
            self.filters[name] = _bounded_padding(self.filters[name])
        self.filters["format"] = _no_formatting
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise SecurityError("it takes too long")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_lookup(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_lookup(obj, argument)
        return super().getitem(obj, argument)

    def _check_lookup(self, obj: Any, name: Any) -> None:
        self.check_time()
        if isinstance(obj, str) and name in _PADDING_METHODS:
            raise SecurityError(f"the method {name!r} of texts is not available")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "**", _, _:
                raise SecurityError("powers are not available")
            case "%", int() | float(), int() | float():
                return left % right
            case "*", int() | float(), int() | float():
                if max(abs(left), abs(right)) > _MAX_FACTOR:
                    raise SecurityError("a factor is too large")
                return left * right
            case "*", (str() | list() | tuple()) as repeated, int() as times:
                pass
            case "*", int() as times, (str() | list() | tuple()) as repeated:
                pass
            case _:
                raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
        if len(repeated) * times > self._max_characters:
            raise SecurityError("a repetition is too long")
        return repeated * times


def _bounded_padding(padding_filter: Callable[..., str]) -> Callable[..., str]:
    def bounded(text: str, width: Any = 4, *rest: Any, **options: Any) -> str:
        if not isinstance(width, int) or width > _MAX_PADDING:
            raise SecurityError(f"padding must be a number of at most {_MAX_PADDING}")
        return padding_filter(text, width, *rest, **options)

    return bounded


def _no_formatting(*args: Any, **kwargs: Any) -> NoReturn:
    raise SecurityError("the filter 'format' is not available")


def _to_json(
    value: Json,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: not escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _not_empty(messages: Sequence[Mapping[str, Json]]) -> Sequence[Mapping[str, Json]]:
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    return messages


def _checked_message(message: Mapping[str, Json], index: int) -> dict[str, Json]:
    """A copy whose content is text (or None, as beside tool calls)."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"messages[{index}].role must be a non-empty string", param=f"messages[{index}].role")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        content = _joined_parts(content, f"messages[{index}].content")
    return {**message, "content": content}


def _joined_parts(parts: Json, param: str) -> str:
    if not isinstance(parts, Sequence):
        raise InvalidRequest(f"{param} must be a string or a list of text parts", param=param)
    texts: list[str] = []
    for index, part in enumerate(parts):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                raise InvalidRequest(f"{param}[{index}] is of type {kind!r}, only text is supported", param=param)
            case _:
                raise InvalidRequest(f"{param}[{index}] must be a text part", param=param)
    return "".join(texts)
