"""Every bad request gets one error object with a status, a message and, where there is one, the field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster.types import Role
from tests.fakes import FakeWorker
from tests.integration.router_harness import MODEL, WAIT_S, RunningRouter, http_client, running_router

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    decode, prefill = [FakeWorker(Role.DECODE, "d0", max_model_len=128)], [FakeWorker(Role.PREFILL, "p0")]
    async with running_router(decode, prefill, max_body_bytes=20_000, body_timeout_s=1.0) as running:
        yield running
        assert not any(worker.requests for worker in running.workers), "a bad request reached a worker"


@pytest.fixture
async def client(router: RunningRouter) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(router) as opened:
        yield opened


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (CHAT, {"messages": []}, "messages", "empty"),
        (CHAT, {}, "messages", "messages"),
        (CHAT, {"messages": "hi"}, "messages", "array"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages", "wizard"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        (CHAT, {"messages": [{"role": "user", "content": "unrenderable"}]}, "messages", "template"),
        (CHAT, {"messages": HELLO, "temperature": -1}, "temperature", "-1"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature", "str"),
        (CHAT, {"messages": HELLO, "n": 1_000_000}, "n", "1000000"),
        (CHAT, {"messages": HELLO, "n": 0}, "n", "0"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens", "0"),
        (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens", "int"),
        (CHAT, {"messages": HELLO, "max_tokens": 10**30}, "max_tokens", "128"),
        (CHAT, {"messages": HELLO, "top_p": 0}, "top_p", "0"),
        (CHAT, {"messages": HELLO, "seed": 10**30}, "seed", "64"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs"),
        (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        (CHAT, {"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias", "101"),
        (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, "logit_bias", "token ids"),
        (CHAT, {"messages": HELLO, "stop": ["a"] * 17}, "stop", "17"),
        (CHAT, {"messages": HELLO, "stop": [""]}, "stop", "0"),
        (CHAT, {"messages": HELLO, "kv_transfer_params": {}}, "kv_transfer_params", "internal"),
        (CHAT, {"messages": HELLO, "tools": [{}], "tool_choice": "required"}, "tools", "tools"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format", "response_format"),
        (CHAT, {"messages": HELLO, "structured_outputs": {"regex": "a"}}, "structured_outputs", "structured_outputs"),
        (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template", "chat_template"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (TEXT, {"prompt": []}, "prompt", "empty"),
        (TEXT, {"prompt": [[]]}, "prompt", "empty"),
        (TEXT, {"prompt": [1, "a"]}, "prompt", "mixture"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "object"),
        (TEXT, {"prompt": [1, -1]}, "prompt", "-1"),
        (TEXT, {"prompt": [260]}, "prompt", "260"),
        (TEXT, {"prompt": [-1] * 4096, "echo": True}, "prompt", "4096"),
        (TEXT, {"prompt": ["a"] * 129}, "prompt", "129"),
        (TEXT, {"prompt": ["a"] * 65, "n": 2}, "n", "130"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
        (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "best_of"),
        (TEXT, {"prompt": "x", "min_tokens": 17}, "min_tokens", "17"),
        (TEXT, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ],
)
async def test_wrong_field_is_named(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    error = error_of(await client.post(path, json={"model": MODEL, **fields}), 400)
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a"} trailing',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "unknown": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 9_000 + b"]" * 9_000 + b"}",
        b'{"prompt": "a", "unknown": ' + b"[" * 9_000 + b"]" * 9_000 + b"}",
        b"[]",
        b"null",
    ],
)
async def test_malformed_body(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post(TEXT, content=body), 400)


async def test_prompt_longer_than_the_context_names_both_numbers(client: httpx.AsyncClient) -> None:
    for fields in ({"prompt": [1] * 200}, {"prompt": "y" * 199}):  # one more: the fake's first token of a text
        error = error_of(await client.post(TEXT, json=fields), 400)
        assert "200" in error["message"]
        assert "128" in error["message"]
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    for count in (127, 400):  # the context in full, and far more than it
        messages = [{"role": "user", "content": "y" * count}]
        error = error_of(await client.post(CHAT, json={"messages": messages}), 400)
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    error = error_of(await client.post(TEXT, json={"prompt": [1] * 100, "max_tokens": 29}), 400)
    assert "129" in error["message"]
    assert error["param"] == "max_tokens"


async def test_unknown_model_names_what_is_served(client: httpx.AsyncClient) -> None:
    for path, fields in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        error = error_of(await client.post(path, json={"model": "gpt-5", **fields}), 404)
        assert MODEL in error["message"]
        assert error["code"] == "model_not_found"


async def test_no_route_and_wrong_method(client: httpx.AsyncClient) -> None:
    assert "/v2/nothing" in error_of(await client.get("/v2/nothing"), 404)["message"]
    error_of(await client.get(CHAT), 405)
    error_of(await client.post("/health", content=b"x"), 405)


async def test_body_over_the_limit(client: httpx.AsyncClient) -> None:
    """Also one without Content-Length: it is counted while it is read."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 1000

    for content in (b" " * 20_001, pieces(), b" " * 50_000_000):
        error = error_of(await client.post(TEXT, content=content), 413)
        assert "20000" in error["message"]
    error_of(await client.post(TEXT, content=b"{}"), 400)


async def test_body_that_does_not_come(router: RunningRouter) -> None:
    host, port = router.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive within 1 s" in answer
    writer.close()


async def test_malformed_http_and_oversized_head(router: RunningRouter) -> None:
    host, port = router.url.removeprefix("http://").split(":")
    for request, status in ((b"NONSENSE\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, b"431")):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), WAIT_S)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b'"error"' in answer
        writer.close()


async def test_request_id_is_echoed_only_if_it_is_fit_for_a_log(client: httpx.AsyncClient) -> None:
    echoed = await client.get("/version", headers={"X-Request-Id": "client-7"})
    assert echoed.headers["x-request-id"] == "client-7"
    for bad in ("a b", "x" * 129, "<script>"):
        replaced = await client.get("/version", headers={"X-Request-Id": bad})
        assert replaced.headers["x-request-id"] not in ("", bad)
