"""Chat templates: what transformers renders, inside limits, with errors for the client."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.errors import InvalidRequest, ModelError
from cluster.tokenizer.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS_AND_MORE = """\
{%- if tools %}
{{- bos_token }}tools: {% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}
{% endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == "assistant" %}{% generation %}{{ message.content | trim }}{% endgeneration %}{% else %}
{{ message.role | upper }}[{{ ns.count }}]: {{ message.content.strip()[:20] }} {{ "-" * 3 }}
    {% endif %}
{%- endfor %}
{% if enable_thinking is defined and not enable_thinking %}no thinking{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "skip", "content": "never shown"},
    {"role": "user", "content": "  What is the capital of France?  "},
    {"role": "assistant", "content": " Paris. "},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "größe", "parameters": {"a": [1, None, True, "<x>"]}}}
]


def template(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, **options)


@pytest.mark.parametrize("source", [CHATML, TOOLS_AND_MORE])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_what_transformers_renders(source: str, add_generation_prompt: bool) -> None:
    (wanted,), _ = render_jinja_template(
        [MESSAGES],
        tools=TOOLS,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        enable_thinking=False,
    )
    rendered = template(source).render(
        MESSAGES, tools=TOOLS, add_generation_prompt=add_generation_prompt, variables={"enable_thinking": False}
    )
    assert rendered == wanted


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "ab<|im_end|>" in template(CHATML).render([{"role": "user", "content": parts}])
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\] is of type 'image_url'") as caught:
        template(CHATML).render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], r"messages must not be empty"),
        ([{"content": "x"}], r"messages\[0\].role must be a non-empty string"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a string or a list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] must be a text part"),
    ],
)
def test_malformed_messages_are_named(messages: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        template(CHATML).render(messages)


def test_a_template_can_refuse() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
    with pytest.raises(InvalidRequest, match=r"cannot render these messages: start with the user"):
        template(source).render([{"role": "tool", "content": "x"}])


def test_time_of_day_is_the_clocks() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    rendered = template(source, now=lambda: datetime(2026, 11, 3)).render([{"role": "user", "content": ""}])
    assert rendered == "03 Nov 2026"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.time }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in messages %}{{ x.update({'role': 'y'}) }}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ ('a' * 1000000) * 1000000 }}",
        "{{ 1 + messages }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{% include 'file' %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | indent(1000000000) }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot render these messages"):
        template(source).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{{ i }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(body: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"too long"):
        template(body, time_limit_s=0.1, max_output_characters=10**6).render([{"role": "user", "content": "x"}])
    assert time.monotonic() - started < 30


def test_output_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match=r"the rendered chat is too long"):
        template(CHATML, max_output_characters=100).render([{"role": "user", "content": "x" * 101}])


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_variables_cannot_replace_what_the_server_sets(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' cannot be set"):
        template(CHATML).render([{"role": "user", "content": "x"}], variables={name: "y"})


def test_a_template_that_does_not_parse_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"cannot be parsed"):
        template("{% for %}")
