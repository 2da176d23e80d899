"""What the router does when workers or clients fail: one terminal each, the same tokens, nothing held anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster.errors import HandshakeMismatch, NumericalError, Overloaded, TransferFailed
from cluster.router.text import NUM_THREADS
from cluster.types import Role
from tests.fakes import ByteCodec, FakeWorker, expected_tokens
from tests.integration.router_harness import RunningRouter, http_client, running_router
from tests.waiting import until

TEXT = "/v1/completions"
PROMPT = list(range(1, 40))


def request_body(count: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": 11, "max_tokens": count, "return_token_ids": True, **fields}


def decode_worker(name: str = "d0", **options: Any) -> FakeWorker:
    return FakeWorker(Role.DECODE, name, **options)


def prefill_worker(name: str = "p0") -> FakeWorker:
    return FakeWorker(Role.PREFILL, name)


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The events of a stream; None for [DONE]."""
    async for line in response.aiter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any] | None]:
    async with client.stream("POST", TEXT, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return [event async for event in events_of(response)]


def ids_of(events: list[dict[str, Any] | None]) -> list[int]:
    return [token for event in events if event and "choices" in event for token in event["choices"][0]["token_ids"]]


async def restart_once_none_is_up(workers: list[FakeWorker]) -> None:
    await until(lambda: not any(worker.is_up for worker in workers))
    await asyncio.sleep(0.3)  # in which the stream waits for one
    for worker in workers:
        worker.restart()


@pytest.mark.parametrize("is_split", [False, True])
async def test_lost_decode_worker_in_mid_stream_goes_on_elsewhere_with_the_same_tokens(is_split: bool) -> None:
    decode = [decode_worker("d0"), decode_worker("d1")]
    prefill = [prefill_worker()] if is_split else None
    for worker in decode:
        worker.dies_at = 5
    decode[1].dies_at = 8
    async with running_router(decode, prefill, failover_wait_s=60.0) as router, http_client(router) as client:
        restarting = asyncio.create_task(restart_once_none_is_up(decode))
        events = await streamed(client, request_body(12, n=1))
        await restarting
    assert ids_of(events) == expected_tokens(PROMPT, 11, 12)
    assert events[-1] is None
    continued = [request for worker in decode for request in worker.requests if request.attempt > 0]
    assert continued
    assert all(request.prompt_length == len(PROMPT) for request in continued)
    assert len({request.request_id for worker in decode for request in worker.requests}) == 1


async def test_lost_prefill_worker_is_replaced_before_the_client_notices() -> None:
    prefill = [prefill_worker("p0"), prefill_worker("p1")]
    for worker in prefill[:1]:
        worker.dies_at = 0
    async with running_router([decode_worker()], prefill) as router, http_client(router) as client:
        for _ in range(4):  # whichever of the two is preferred
            answer = await client.post(TEXT, json=request_body(3))
            assert answer.json()["choices"][0]["token_ids"] == expected_tokens(PROMPT, 11, 3)


async def test_no_worker_left_is_one_typed_error_at_the_end_of_the_stream() -> None:
    decode = [decode_worker()]
    decode[0].dies_at = 3
    async with running_router(decode, failover_wait_s=0.1) as router, http_client(router) as client:
        events = await streamed(client, request_body(12))
        assert ids_of(events) == expected_tokens(PROMPT, 11, 3)
        assert events[-1] is not None
        assert events[-1]["error"]["type"] == "overloaded_error"
        assert None not in events
        health = await client.get("/health")
        assert health.status_code == 503
        assert "connection refused" in health.json()["error"]["message"]


async def test_a_decode_worker_that_drains_while_its_prompt_is_computed_takes_it_still() -> None:
    decode, prefill = [decode_worker()], [prefill_worker()]
    goes_on = prefill[0].holds_prefill = asyncio.Event()
    async with running_router(decode, prefill) as router, http_client(router) as client:
        answer = asyncio.create_task(client.post(TEXT, json=request_body(5)))
        await until(lambda: bool(prefill[0].running))
        decode[0].is_draining = True
        goes_on.set()
        assert (await answer).json()["choices"][0]["token_ids"] == expected_tokens(PROMPT, 11, 5)
        assert decode[0].num_promised == 0
        assert (await client.post(TEXT, json=request_body(5))).status_code == 503


async def test_no_ready_worker_is_503_with_retry_after() -> None:
    decode = [decode_worker()]
    decode[0].is_up = False
    async with running_router(decode) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(3))
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert (await client.get("/v1/models")).status_code == 200


async def test_mismatched_pair_is_placed_elsewhere_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    decode = [decode_worker("d0"), decode_worker("d1")]
    decode[0].mismatch = HandshakeMismatch({"model_digest": ("a", "b")})
    async with running_router(decode, [prefill_worker()]) as router, http_client(router) as client:
        for seed in range(6):
            body = request_body(4, seed=seed, prompt=[seed] * 40)
            answer = await client.post(TEXT, json=body)
            assert answer.json()["choices"][0]["token_ids"] == expected_tokens([seed] * 40, seed, 4)
        metrics = (await client.get("/metrics")).text
    assert len(decode[0].requests) <= 1
    assert decode[0].requests == [] or "model_digest (ours a, theirs b)" in caplog.text
    if decode[0].requests:
        assert (
            'tandem_handshake_refusals_total{engine="router",field="model_digest",model_name="fake-model"} 1.0'
            in metrics
        )


async def test_texts_that_nobody_waits_for_any_more_are_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would hold up prompts of others, and pile up."""
    started: list[str] = []
    goes_on = threading.Event()

    def slow(self: ByteCodec, text: str, **options: Any) -> list[int]:
        started.append(text[:4])
        assert goes_on.wait(60.0)
        return [1]

    monkeypatch.setattr(ByteCodec, "encode", slow)
    async with running_router([decode_worker()], max_running_requests=40) as router, http_client(router) as client:
        text = "left" * 2000  # long ones are tokenized in threads
        waiting = [asyncio.create_task(client.post("/tokenize", json={"prompt": text})) for _ in range(40)]
        await until_load_is(router, 40)
        full = await client.post("/tokenize", json={"prompt": "x"})
        assert (full.status_code, full.json()["error"]["type"]) == (503, "overloaded_error")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until_load_is(router, 0)
        goes_on.set()
        answer = await client.post("/tokenize", json={"prompt": "next" * 2000})
        assert answer.json()["count"] == 1
    assert started == ["left"] * NUM_THREADS + ["next"]


async def test_no_output_counts_as_none_in_every_event() -> None:
    async with running_router([decode_worker()]) as router, http_client(router) as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = request_body(0, echo=True, prompt="abc", stream_options=options)
        events = [event for event in await streamed(client, body) if event]
    assert {event["usage"]["completion_tokens"] for event in events if event.get("usage")} == {0}


async def test_pairs_that_do_not_fit_use_up_no_attempts() -> None:
    """As in a rolling update: most decode workers are of another version, one fits."""
    decode = [decode_worker(f"d{index}") for index in range(6)]
    for worker in decode[:-1]:
        worker.mismatch = HandshakeMismatch({"model_digest": ("a", "b")})
    async with running_router(decode, [prefill_worker()], max_attempts=2) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(4))
        assert answer.json()["choices"][0]["token_ids"] == expected_tokens(PROMPT, 11, 4)


async def test_a_burst_is_spread_over_decode_workers_while_its_prompts_are_computed() -> None:
    decode, prefill = [decode_worker("d0"), decode_worker("d1")], [prefill_worker("p0"), prefill_worker("p1")]
    all_are_in = asyncio.Event()
    for worker in prefill:
        worker.holds_prefill = all_are_in
    async with running_router(decode, prefill) as router, http_client(router) as client:
        bodies = [request_body(4, prompt=[1, 2, 3], seed=seed) for seed in range(24)]
        posting = [asyncio.create_task(client.post(TEXT, json=body)) for body in bodies]
        await until(lambda: sum(len(worker.running) for worker in prefill) == 24)
        all_are_in.set()
        assert [answer.status_code for answer in await asyncio.gather(*posting)] == [200] * 24
    assert sorted(len(worker.requests) for worker in decode) == [12, 12]


async def test_a_prefill_worker_whose_prompts_are_all_decoding_is_idle() -> None:
    decode, prefill = [decode_worker()], [prefill_worker("p0"), prefill_worker("p1")]
    decode[0].step_s = 0.05
    prefill[1].is_up = False
    async with running_router(decode, prefill) as router, http_client(router) as client:
        long = [asyncio.create_task(client.post(TEXT, json=request_body(30, seed=seed))) for seed in range(8)]
        await until(lambda: len(prefill[0].requests) == 8 and not prefill[0].running)
        load = (await client.get("/load")).json()["workers"]
        assert load == {"decode-0": 8, "prefill-0": 0, "prefill-1": 0}
        prefill[1].is_up = True
        for seed in range(12):  # no prefix is known anywhere
            await client.post(TEXT, json=request_body(1, prompt=[100 + seed, 7], seed=seed))
        assert [answer.status_code for answer in await asyncio.gather(*long)] == [200] * 8
    assert len(prefill[0].requests) - 8 >= 3, "it is not avoided for what runs elsewhere"


async def test_no_compatible_pair_is_503_and_the_log_names_the_field(caplog: pytest.LogCaptureFixture) -> None:
    decode, prefill = [decode_worker()], [prefill_worker()]
    decode[0].mismatch = HandshakeMismatch({"numeric_fingerprint": ("a", "b")})
    async with running_router(decode, prefill, failover_wait_s=0.0) as router, http_client(router) as client:
        for _ in range(2):
            answer = await client.post(TEXT, json=request_body(4))
            assert answer.status_code == 503
        assert len(decode[0].requests) == 1, "a pair that has refused each other was tried again"
        decode[0].restart()
        decode[0].mismatch = None
        assert (await client.post(TEXT, json=request_body(4))).status_code == 200
    assert "numeric_fingerprint (ours a, theirs b)" in caplog.text
    assert len(prefill[0].released) == 1


async def test_failed_transfer_is_computed_again() -> None:
    decode, prefill = [decode_worker()], [prefill_worker()]
    decode[0].error = TransferFailed("no route")
    async with running_router(decode, prefill) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(12))
        assert answer.status_code == 502
        assert len(decode[0].requests) == 4, "retries are bounded"
        assert len(prefill[0].released) == 4
        decode[0].error = None
        assert (await client.post(TEXT, json=request_body(4))).status_code == 200


async def test_error_of_the_request_itself_is_not_retried() -> None:
    decode = [decode_worker("d0"), decode_worker("d1")]
    for worker in decode:
        worker.error = NumericalError("NaN in the logits")
    async with running_router(decode) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(4))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "numerical_error"
    assert sum(len(worker.requests) for worker in decode) == 1


async def test_overloaded_worker_sends_the_request_to_another() -> None:
    decode = [decode_worker("d0"), decode_worker("d1")]
    decode[0].error = Overloaded("full")
    async with running_router(decode) as router, http_client(router) as client:
        answers = [await client.post(TEXT, json=request_body(2, prompt=[seed] * 40)) for seed in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6


async def test_a_client_is_told_what_is_missing_and_an_operator_where() -> None:
    decode, prefill = [decode_worker()], [prefill_worker("10.0.0.7:7100")]
    async with running_router(decode, prefill) as router, http_client(router) as client:
        prefill[0].is_up = False
        refused = await client.post(TEXT, json=request_body(2))
        health = await client.get("/health")
    assert (refused.status_code, health.status_code) == (503, 503)
    assert refused.json()["error"]["message"] == "no prefill worker is ready (of 1)"
    assert "10.0.0.7:7100" in health.text


async def test_full_worker_without_another_is_503_at_once() -> None:
    decode = [decode_worker()]
    decode[0].error = Overloaded("full")
    async with running_router(decode) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(2))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert len(decode[0].requests) == 1


async def test_request_that_a_draining_worker_gives_up_goes_on_elsewhere() -> None:
    decode = [decode_worker("d0"), decode_worker("d1")]
    for worker in decode:
        worker.gives_up_at = 4
    async with running_router(decode) as router, http_client(router) as client:
        events = await streamed(client, request_body(10))
    assert ids_of(events) == expected_tokens(PROMPT, 11, 10)
    assert events[-1] is None
    assert sum(len(worker.requests) for worker in decode) == 3


@pytest.mark.parametrize("stage", ["prefill", "hand-over", "decode"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_client_gone_frees_everything(stage: str, is_stream: bool) -> None:
    """Also between the end of prefill and the first chunk of decode, where two workers hold something."""
    decode, prefill = [decode_worker(step_s=0.01)], [prefill_worker()]
    prefill[0].prefill_s = 60.0 if stage == "prefill" else 0.0
    decode[0].holds_decode = asyncio.Event() if stage == "hand-over" else None
    async with running_router(decode, prefill) as router:
        async with http_client(router) as client:
            sending = asyncio.create_task(_read(client, request_body(1500, stream=is_stream)))
            watched = prefill[0] if stage == "prefill" else decode[0]
            await until(lambda: bool(watched.running))
            await asyncio.sleep(0.05)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        await router.settle()
        assert watched.cancelled
        assert watched.served == []
        if stage != "decode":
            assert prefill[0].released == [(watched.requests[0].request_id, 0)]
        assert (await _load(router)) == 0


async def _read(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", TEXT, json=body) as response:
        async for _ in response.aiter_lines():
            pass


async def _load(router: RunningRouter) -> int:
    async with http_client(router) as client:
        value: int = (await client.get("/load")).json()["server_load"]
        return value


async def until_load_is(router: RunningRouter, count: int) -> None:
    async with asyncio.timeout(60.0):
        while await _load(router) != count:  # noqa: ASYNC110  the router has no events
            await asyncio.sleep(0.02)


async def test_sibling_that_fails_ends_the_others() -> None:
    decode = [decode_worker("d0", step_s=0.005), decode_worker("d1", step_s=0.005)]
    decode[1].error = NumericalError("NaN")
    async with running_router(decode) as router, http_client(router) as client:
        answer = await client.post(TEXT, json={"prompt": "short", "max_tokens": 500, "n": 8})
        assert answer.status_code == 500
        await router.settle()


async def test_over_the_limit_is_refused_at_once_and_counted_per_sequence() -> None:
    decode = [decode_worker()]
    goes_on = decode[0].holds_decode = asyncio.Event()
    async with running_router(decode, max_running_requests=4) as router, http_client(router) as client:
        long = asyncio.create_task(client.post(TEXT, json=request_body(20, n=3)))
        await until(lambda: len(decode[0].running) == 3)
        decode[0].holds_decode = None  # for those that come now
        refused = await client.post(TEXT, json=request_body(2, n=2))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await client.post(TEXT, json=request_body(2))).status_code == 200
        goes_on.set()
        assert (await long).status_code == 200
        assert (await client.post(TEXT, json=request_body(2, n=4))).status_code == 200


async def test_deadline_ends_a_request_that_hangs() -> None:
    decode, prefill = [decode_worker()], [prefill_worker()]
    decode[0].holds_decode = asyncio.Event()
    async with running_router(decode, prefill, request_timeout_s=2.0) as router, http_client(router) as client:
        answer = await client.post(TEXT, json=request_body(4))
        assert answer.status_code == 504
        events = await streamed(client, request_body(4))
        assert events[-1] is not None
        assert events[-1]["error"]["code"] == "deadline_exceeded"


async def test_reader_that_stops_reading_is_dropped_and_others_go_on() -> None:
    decode = [decode_worker(max_model_len=1 << 20)]
    async with running_router(decode, write_timeout_s=0.4) as router, http_client(router) as client:
        host, port = router.url.removeprefix("http://").split(":")
        body = json.dumps(request_body(500_000, stream=True, logprobs=5)).encode()
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readexactly(100)
        assert (await client.post(TEXT, json=request_body(20))).status_code == 200
        await router.settle()
        assert len(decode[0].cancelled) == 1
        writer.transport.abort()


async def test_shutdown_finishes_streams_and_refuses_new_requests() -> None:
    decode = [decode_worker(step_s=0.01)]
    async with running_router(decode) as router, http_client(router) as client:
        async with client.stream("POST", TEXT, json=request_body(30, stream=True)) as response:
            events = events_of(response)
            first = await anext(events)
            router.stop.request()
            rest = [event async for event in events]
        assert ids_of([first, *rest]) == expected_tokens(PROMPT, 11, 30)
        assert rest[-1] is None
        with pytest.raises(httpx.TransportError):
            await client.post(TEXT, json=request_body(1))


async def test_shutdown_ends_what_takes_too_long_with_an_error_event() -> None:
    decode, prefill = [decode_worker(step_s=0.01)], [prefill_worker()]
    async with running_router(decode, prefill, drain_timeout_s=1) as router, http_client(router) as client:
        async with client.stream("POST", TEXT, json=request_body(1900, stream=True)) as response:
            events = events_of(response)
            await anext(events)
            router.stop.request()
            rest = [event async for event in events]
        assert rest[-1] is not None
        assert "shutting down" in rest[-1]["error"]["message"]
        await router.settle()
