"""The engine's promises, over a fake model that notices any wrong block, row or position."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent, PromptFinished, PromptProgress, PromptStarted
from cluster.errors import ContextTooLong, InvalidRequest, StartupError
from cluster.types import FinishReason, Request, TokenChunk
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.unit.engine_fakes import (
    BLOCK_SIZE,
    EOS,
    NAN_TOKEN,
    VOCAB_SIZE,
    FakeModel,
    Outcome,
    collect,
    make_engine,
    make_request,
    prompt_of,
    run_all,
)

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 129, 160)


def mixed_requests(lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    """Greedy and sampled, with and without penalties and logprobs."""
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 7, "logprobs": 3},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 1 << 62},
        {"temperature": 1.3, "min_p": 0.02, "presence_penalty": 1.0, "repetition_penalty": 1.3, "logprobs": 0},
        {"frequency_penalty": 1.5, "min_tokens": 4, "logit_bias": ((3, 2.0),), "prompt_logprobs": 2},
    ]
    return [
        make_request(f"r{index}", prompt_of(length, index), max_tokens=40, **variants[index % len(variants)])
        for index, length in enumerate(lengths)
    ]


def finish(engine: Engine, requests: list[Request], check_each_step: bool = False) -> dict[str, Outcome]:
    for request in requests:
        engine.add_request(request)
    outcomes = run_all(engine, check_each_step=check_each_step)
    engine.blocks.check_integrity()
    assert engine.blocks.num_free == engine.num_blocks
    return outcomes


def comparable(outcome: Outcome) -> tuple[object, ...]:
    prompt_logprobs = [chunk.prompt_logprobs for chunk in outcome.chunks if chunk.prompt_logprobs]
    return outcome.token_ids, outcome.logprobs, prompt_logprobs, outcome.last.finish_reason, outcome.last.stop_token_id


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    """Each request alone in an engine of its own, its prompt in one piece."""
    return {
        request.request_id: finish(make_engine(DecodePolicy(), max_batched_tokens=256), [request])[request.request_id]
        for request in mixed_requests()
    }


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    ("max_batched_tokens", "num_blocks", "max_num_sequences"), [(16, 64, 3), (37, 64, 8), (97, 16, 16), (64, 21, 16)]
)
def test_bits_do_not_depend_on_chunks_neighbours_or_preemption(
    reference: dict[str, Outcome], max_batched_tokens: int, num_blocks: int, max_num_sequences: int, steps_ahead: int
) -> None:
    engine = make_engine(
        DecodePolicy(),
        max_batched_tokens=max_batched_tokens,
        num_blocks=num_blocks,
        max_num_sequences=max_num_sequences,
        steps_ahead=steps_ahead,
    )
    outcomes = finish(engine, mixed_requests(), check_each_step=True)
    assert outcomes.keys() == reference.keys()
    for request_id, outcome in outcomes.items():
        assert comparable(outcome) == comparable(reference[request_id]), request_id


def test_the_cases_above_do_preempt() -> None:
    engine = make_engine(DecodePolicy(), max_batched_tokens=97, num_blocks=16, max_num_sequences=16)
    finish(engine, mixed_requests())
    assert engine.load().preemptions > 0


def test_tokens_are_recomputed_row_by_row_beside_others() -> None:
    """Beside another prompt, with a budget of two: a row draws nothing, of a sequence that has put out tokens."""

    def run(**limits: Any) -> tuple[dict[str, Outcome], int]:
        engine = make_engine(DecodePolicy(), max_model_len=64, enable_prefix_caching=False, **limits)
        requests = [make_request(f"r{i}", prompt_of(14, i), max_tokens=40, ignore_eos=True) for i in range(3)]
        return finish(engine, requests), engine.load().preemptions

    expected, _ = run()
    found, num_preemptions = run(num_blocks=5, max_batched_tokens=2)
    assert num_preemptions > 0
    assert {key: each.token_ids for key, each in found.items()} == {
        key: each.token_ids for key, each in expected.items()
    }


def test_bits_do_not_depend_on_the_prefix_cache(reference: dict[str, Outcome]) -> None:
    engine = make_engine(DecodePolicy(), num_blocks=256)
    for round_index in range(3):
        outcomes = finish(engine, mixed_requests())
        for request, outcome in zip(mixed_requests(), outcomes.values(), strict=True):
            assert comparable(outcomes[request.request_id]) == comparable(reference[request.request_id])
            num_prompt = len(request.token_ids)
            expected = (
                0 if request.sampling.prompt_logprobs is not None else (num_prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
            )
            assert outcomes[request.request_id].chunks[0].num_cached_tokens == (expected if round_index else 0)
            assert all(chunk.num_cached_tokens == 0 for chunk in outcome.chunks[1:])


@pytest.mark.parametrize("num_emitted", [1, 3, 9])
def test_a_continuation_elsewhere_draws_the_same_tokens(reference: dict[str, Outcome], num_emitted: int) -> None:
    for request in mixed_requests():
        whole = reference[request.request_id]
        if len(whole.token_ids) <= num_emitted or request.sampling.prompt_logprobs is not None:
            continue
        so_far = request.token_ids + tuple(whole.token_ids[:num_emitted])
        parameters = {field: getattr(request.sampling, field) for field in request.sampling.__struct_fields__}
        continuation = make_request("c", so_far, num_prompt_tokens=len(request.token_ids), attempt=1, **parameters)
        outcome = finish(make_engine(DecodePolicy(), max_batched_tokens=29), [continuation])["c"]
        assert outcome.chunks[0].index == num_emitted
        assert outcome.token_ids == whole.token_ids[num_emitted:]
        assert outcome.logprobs == whole.logprobs[num_emitted:]


def run_prefill(engine: Engine, request: Request) -> tuple[list[EngineEvent], PromptFinished]:
    engine.add_request(request)
    events: list[EngineEvent] = []
    while engine.has_work():
        events += engine.step()
    finished = events[-1]
    assert isinstance(finished, PromptFinished)
    return events, finished


def hand_over(prefill: Engine, decode: Engine, finished: PromptFinished, request: Request) -> Request:
    """Copy what a connector would pull, then give the request to the decode engine."""
    assert finished.lease is not None
    token_ids = request.token_ids + finished.chunk.token_ids
    parameters = {field: getattr(request.sampling, field) for field in request.sampling.__struct_fields__}
    continued = make_request(request.request_id, token_ids, num_prompt_tokens=len(request.token_ids), **parameters)
    reservation = decode.reserve_blocks(continued, finished.lease.num_tokens)
    assert reservation is not None
    decode.blocks.start_loading(reservation)
    first = reservation.num_shared_blocks
    sources = finished.lease.block_ids[first:]
    decode.kv_cache.kv_NL2HSD[list(reservation.loading_block_ids)] = prefill.kv_cache.kv_NL2HSD[list(sources)]
    decode.add_loaded_request(continued, reservation)
    prefill.release(finished.lease)
    return continued


def test_prefill_then_decode_gives_the_bits_of_one_engine(reference: dict[str, Outcome]) -> None:
    prefill = make_engine(PrefillPolicy(), max_batched_tokens=23, num_blocks=256)
    decode = make_engine(DecodePolicy(), num_blocks=256)
    for attempt in range(2):  # the second time with warm prefix caches on both sides
        outcomes: dict[str, Outcome] = {}
        for request in mixed_requests():
            _, finished = run_prefill(prefill, request)
            outcomes[request.request_id] = outcome = Outcome()
            outcome.chunks.append(finished.chunk)
            outcome.token_ids.extend(finished.chunk.token_ids)
            outcome.logprobs.extend(finished.chunk.logprobs)
            if finished.lease is None:
                continue
            hand_over(prefill, decode, finished, request)
            while decode.has_work():
                collect(outcomes, decode.step())
            whole = reference[request.request_id]
            assert (outcome.token_ids, outcome.logprobs) == (whole.token_ids, whole.logprobs), (attempt, request)
            assert list(finished.prompt_logprobs) == list(whole.chunks[0].prompt_logprobs)
    for engine in (prefill, decode):
        engine.blocks.check_integrity()
        assert engine.blocks.num_free == engine.num_blocks
        assert engine.load().cached_tokens > 0


def test_prefill_events_come_in_order_and_the_lease_keeps_the_blocks() -> None:
    engine = make_engine(PrefillPolicy(), max_batched_tokens=32, num_blocks=16)
    events, finished = run_prefill(engine, make_request("a", prompt_of(70)))
    started = events[0]
    assert isinstance(started, PromptStarted)
    assert len(started.block_ids) == 5
    progress = [event.num_computed_tokens for event in events if isinstance(event, PromptProgress)]
    assert progress == [32, 64, 70]
    assert finished.lease is not None
    assert finished.lease.block_ids == started.block_ids
    assert finished.lease.generations == started.generations
    assert engine.load().num_leased_blocks == 5
    engine.release(finished.lease)
    assert engine.blocks.num_free == 16


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"logit_bias": ((EOS, 100.0),)}])
def test_a_request_that_ends_with_its_first_token_leases_nothing(sampling: dict[str, Any]) -> None:
    engine = make_engine(PrefillPolicy())
    _, finished = run_prefill(engine, make_request("a", prompt_of(20), **sampling))
    assert finished.lease is None
    assert finished.chunk.finish_reason is not None
    assert engine.blocks.num_free == engine.num_blocks


def test_prefill_waits_for_leases_and_says_that_it_is_blocked() -> None:
    engine = make_engine(PrefillPolicy(), num_blocks=16)
    _, finished = run_prefill(engine, make_request("a", prompt_of(200)))
    engine.add_request(make_request("b", prompt_of(100, 5)))
    assert engine.step() == []
    assert engine.is_blocked
    assert engine.has_work()
    assert finished.lease is not None
    engine.release(finished.lease)
    assert engine.step() != []
    assert not engine.is_blocked


def test_finish_reasons() -> None:
    stop = next(token for token in range(VOCAB_SIZE) if token not in (EOS, NAN_TOKEN))
    requests = [
        make_request("eos", prompt_of(5), logit_bias=((EOS, 100.0),)),
        make_request("ignored", prompt_of(5), logit_bias=((EOS, 100.0),), ignore_eos=True, max_tokens=3),
        make_request("stop_id", prompt_of(5), logit_bias=((stop, 100.0),), stop_token_ids=(stop,)),
        make_request("minimum", prompt_of(5), logit_bias=((EOS, 100.0),), min_tokens=3),
        make_request("context", prompt_of(250), max_tokens=100),
    ]
    outcomes = finish(make_engine(DecodePolicy()), requests)
    last = {request_id: outcome.last for request_id, outcome in outcomes.items()}
    assert (last["eos"].finish_reason, last["eos"].stop_token_id) == (FinishReason.STOP, EOS)
    assert outcomes["eos"].token_ids == [EOS]
    assert (last["ignored"].finish_reason, outcomes["ignored"].token_ids) == (FinishReason.LENGTH, [EOS] * 3)
    assert (last["stop_id"].finish_reason, last["stop_id"].stop_token_id) == (FinishReason.STOP, stop)
    assert len(outcomes["minimum"].token_ids) == 4
    assert outcomes["minimum"].token_ids[3] == EOS
    assert (last["context"].finish_reason, len(outcomes["context"].token_ids)) == (FinishReason.LENGTH, 6)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_nan_row_fails_its_request_only_and_is_never_shared(reference: dict[str, Outcome], steps_ahead: int) -> None:
    engine = make_engine(DecodePolicy(), steps_ahead=steps_ahead, max_batched_tokens=16)
    broken = (*prompt_of(40), NAN_TOKEN)
    bad = [
        make_request("bad", broken),
        make_request("bad_sampled", broken[1:], temperature=1.0, top_p=0.9, logprobs=2),
        make_request("bad_prompt", (*broken, 1), prompt_logprobs=1),
    ]
    outcomes = finish(engine, [*mixed_requests()[:4], *bad])
    for request in bad:
        last = outcomes[request.request_id].last
        assert last.finish_reason is FinishReason.ERROR
        assert last.error is not None
        assert last.error.code == "numerical_error"
        assert last.token_ids == ()
    for request in mixed_requests()[:4]:
        assert comparable(outcomes[request.request_id]) == comparable(reference[request.request_id])
    again = finish(engine, [make_request("again", broken)])
    assert again["again"].last.finish_reason is FinishReason.ERROR
    assert engine.load().cached_tokens == 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_cancel_at_any_step_frees_everything_and_ends_once(steps_ahead: int) -> None:
    for num_steps in range(12):
        engine = make_engine(DecodePolicy(), max_batched_tokens=16, num_blocks=16, steps_ahead=steps_ahead)
        for index in range(4):
            engine.add_request(make_request(f"r{index}", prompt_of(40, index), max_tokens=20))
        outcomes: dict[str, Outcome] = {}
        for _ in range(num_steps):
            collect(outcomes, engine.step())
        for _ in range(2):
            engine.cancel("r1", 0)
            engine.cancel("unknown", 0)
            engine.cancel("r2", 1)
        while engine.has_work():
            collect(outcomes, engine.step())
            engine.blocks.check_integrity()
        assert outcomes["r1"].last.finish_reason is FinishReason.CANCELLED
        assert outcomes["r2"].last.finish_reason is FinishReason.LENGTH
        assert engine.blocks.num_free == engine.num_blocks


def timed_requests(engine: Engine) -> dict[str, int]:
    """How many requests each of the histograms of whole requests has seen."""
    readings = {each.name: sum(each.counts) for each in engine.timings.readings()}
    return {name: readings[f"vllm:request_{name}_time_seconds"] for name in ("inference", "decode")}


def test_a_request_of_which_nothing_more_is_wanted_counts_as_served_and_one_given_up_does_not() -> None:
    """The router has found a stop string; a client has left; one was not even begun."""
    engine = make_engine(DecodePolicy(), max_num_sequences=2)
    for name in ("served", "left", "waits"):
        engine.add_request(make_request(name, prompt_of(5), max_tokens=50, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert timed_requests(engine) == {"inference": 0, "decode": 0}
    engine.cancel("served", 0, is_served=True)
    engine.cancel("waits", 0, is_served=True)
    engine.cancel("left", 0)
    while engine.has_work():
        engine.step()
    assert timed_requests(engine) == {"inference": 1, "decode": 1}


def test_deadlines_end_running_and_waiting_requests_tensorrt_llm_12313() -> None:
    clock = itertools.count()
    engine = make_engine(DecodePolicy(), max_num_sequences=1, clock=clock)
    forever = make_request("running", prompt_of(5), max_tokens=200, ignore_eos=True)
    engine.add_request(
        Request(request_id="running", token_ids=forever.token_ids, sampling=forever.sampling, deadline_s=9)
    )
    engine.add_request(
        Request(request_id="waiting", token_ids=forever.token_ids, sampling=forever.sampling, deadline_s=5)
    )
    outcomes = run_all(engine)
    for outcome in outcomes.values():
        assert outcome.last.error is not None
        assert outcome.last.error.code == "deadline_exceeded"
    assert outcomes["waiting"].token_ids == []
    assert outcomes["running"].last.index == len(outcomes["running"].token_ids) > 0
    assert engine.blocks.num_free == engine.num_blocks


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("a", prompt_of(256)), "256 tokens; the context holds 256"),
        (make_request("a", ()), "no tokens"),
        (make_request("a", (1, VOCAB_SIZE)), "outside of the vocabulary"),
        (make_request("a", (1, -1)), "outside of the vocabulary"),
        (make_request("a", (1, 2), temperature=-1.0), "temperature"),
        (make_request("a", (1, 2), num_prompt_tokens=3), "num_prompt_tokens is 3"),
        (make_request("a", (1, 2, 3), num_prompt_tokens=1, max_tokens=2), "generated already"),
        (replace(make_request("a", (1, 2)), deadline_s=float("nan")), "deadline_s must be a positive number, got nan"),
        (replace(make_request("a", (1, 2)), deadline_s=0.0), "deadline_s must be"),
    ],
)
def test_requests_that_cannot_run_are_refused_and_take_nothing(request_: Request, message: str) -> None:
    engine = make_engine(DecodePolicy())
    with pytest.raises(InvalidRequest, match=message):
        engine.add_request(request_)
    with pytest.raises(InvalidRequest):
        engine.reserve_blocks(request_, 1)
    assert not engine.has_work()
    assert engine.blocks.num_free == engine.num_blocks


def test_the_same_attempt_twice_is_refused_another_attempt_is_not() -> None:
    engine = make_engine(DecodePolicy())
    engine.add_request(make_request("a", prompt_of(5)))
    with pytest.raises(InvalidRequest, match="running already"):
        engine.add_request(make_request("a", prompt_of(5)))
    engine.add_request(make_request("a", prompt_of(5), attempt=1))
    ends = []
    while engine.has_work():
        ends += [event for event in engine.step() if isinstance(event, TokenChunk) and event.finish_reason]
    assert sorted(end.attempt for end in ends) == [0, 1]


def test_limits_that_cannot_be_met_are_refused_at_start() -> None:
    with pytest.raises(StartupError, match=r"context of max_model_len 256 tokens needs .* room for 240 tokens"):
        make_engine(DecodePolicy(), num_blocks=15)
    with pytest.raises(StartupError, match="max_model_len is 1000, the model's context is 512"):
        make_engine(DecodePolicy(), max_model_len=1000)
    with pytest.raises(ContextTooLong):
        make_engine(DecodePolicy()).check(make_request("a", prompt_of(300)))


def test_a_loaded_request_may_be_preempted_and_goes_on_with_the_same_bits(reference: dict[str, Outcome]) -> None:
    prefill, decode = make_engine(PrefillPolicy()), make_engine(DecodePolicy(), num_blocks=16, max_num_sequences=16)
    outcomes: dict[str, Outcome] = {}
    for request in mixed_requests():
        _, finished = run_prefill(prefill, request)
        if finished.lease is None or decode.blocks.num_free < len(finished.lease.block_ids) + 5:
            continue
        hand_over(prefill, decode, finished, request)
        outcomes[request.request_id] = Outcome(
            list(finished.chunk.token_ids), list(finished.chunk.logprobs), [finished.chunk]
        )
    assert len(outcomes) >= 4
    filler = [make_request(f"filler{index}", prompt_of(30, 20 + index), max_tokens=60) for index in range(6)]
    for request in filler:
        decode.add_request(request)
    while decode.has_work():
        collect(outcomes, decode.step())
    assert decode.load().preemptions > 0
    for request_id, outcome in outcomes.items():
        if request_id in reference:
            assert outcome.token_ids == reference[request_id].token_ids
            assert outcome.logprobs == reference[request_id].logprobs
    assert decode.blocks.num_free == decode.num_blocks


def test_what_the_fake_model_is_for() -> None:
    """One token changed in the stored KV changes the tokens drawn: the tests above would notice."""
    request = make_request("a", prompt_of(100), max_tokens=20)
    clean = finish(make_engine(DecodePolicy()), [request])["a"].token_ids
    engine = make_engine(DecodePolicy())
    engine.add_request(request)
    engine.step()
    engine.step()
    engine.kv_cache.kv_NL2HSD[1, 1, 0, 0, 3, 0] += 1
    dirty = run_all(engine)["a"].token_ids
    assert clean[2:] != dirty
    assert isinstance(FakeModel().config.vocab_size, int)
    assert array("i").itemsize == 4  # the engine's arrays are read as int32
