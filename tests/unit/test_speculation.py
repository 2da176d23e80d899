"""Engines that speculate draw what engines that do not speculate draw, and store the same KV."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.batch import SampledToken
from cluster.engine.config import SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.speculation.acceptance import accepted
from cluster.types import FinishReason, Request, TokenChunk
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.unit.engine_fakes import (
    BLOCK_SIZE,
    EOS,
    NAN_TOKEN,
    FakeModel,
    Outcome,
    collect,
    make_engine,
    make_request,
    prompt_of,
    run_all,
)
from tests.unit.speculation_fakes import Oracle, always, check_cached, check_stored, never, speculate_with
from tests.unit.test_engine import comparable, finish, hand_over, mixed_requests, run_prefill

MOST_STEPS = 3000  # a broken engine may go on for ever
NGRAM = SpeculationConfig(method="ngram", num_tokens=6)


def alone(requests: list[Request], **options: Any) -> dict[str, Outcome]:
    """Each request by itself, without speculation."""
    return {
        each.request_id: finish(make_engine(DecodePolicy(), **options), [each])[each.request_id] for each in requests
    }


def assert_same(outcomes: dict[str, Outcome], reference: dict[str, Outcome]) -> None:
    assert outcomes.keys() == reference.keys()
    for request_id, outcome in outcomes.items():
        assert comparable(outcome) == comparable(reference[request_id]), request_id


def finish_checked(engine: Engine, requests: list[Request]) -> dict[str, Outcome]:
    """As `finish`, with all books and all stored KV checked after each step."""
    for request in requests:
        engine.add_request(request)
    outcomes: dict[str, Outcome] = {}
    for _ in range(MOST_STEPS):
        if engine.has_work():
            collect(outcomes, engine.step())
            engine.blocks.check_integrity()
            check_stored(engine)
    assert not engine.has_work()
    assert engine.blocks.num_free == engine.num_blocks
    assert engine.scheduler.speculator is not None
    assert not engine.scheduler.speculator._lengths, "something is kept of sequences that have ended"
    check_cached(engine, [(*each.token_ids, *outcomes[each.request_id].token_ids) for each in requests])
    return outcomes


# ---- acceptance


@pytest.mark.parametrize(
    ("drafts", "drawn", "count"),
    [
        ((), [5], 1),
        ((), [], 0),
        ((5,), [5, 6], 2),
        ((4,), [5, 6], 1),
        ((5, 6, 7), [5, 6, 7, 8], 4),
        ((5, 6, 7), [5, 9, 7, 8], 2),
        ((5, 6, 7), [9, 6, 7, 8], 1),
    ],
)
def test_right_guesses_and_one_more_token_are_accepted(drafts: tuple[int, ...], drawn: list[int], count: int) -> None:
    tokens = tuple(SampledToken(token, None) for token in drawn)
    assert accepted(drafts, tokens) == tokens[:count]


def test_nothing_is_accepted_behind_a_token_that_is_not_a_number() -> None:
    tokens = (SampledToken(5, None), SampledToken(6, None, is_nan=True), SampledToken(7, None))
    assert accepted((5, 6), tokens) == tokens[:2]


# ---- the same bits


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    return alone(mixed_requests())


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    ("max_batched_tokens", "num_blocks", "max_num_sequences"), [(37, 64, 8), (97, 16, 16), (64, 21, 16)]
)
@pytest.mark.parametrize("is_right", [always, never, lambda position, place: (position * 7 + place) % 3 > 0])
def test_bits_do_not_depend_on_guesses(
    reference: dict[str, Outcome],
    max_batched_tokens: int,
    num_blocks: int,
    max_num_sequences: int,
    steps_ahead: int,
    is_right: Any,
) -> None:
    engine = make_engine(
        DecodePolicy(),
        max_batched_tokens=max_batched_tokens,
        num_blocks=num_blocks,
        max_num_sequences=max_num_sequences,
        steps_ahead=steps_ahead,
    )
    oracle = speculate_with(engine, Oracle(mixed_requests(), reference, is_right))
    assert_same(finish_checked(engine, mixed_requests()), reference)
    assert (engine.load().preemptions > 0) == (num_blocks < 64)
    num_accepted = sum(count for _, count in oracle.verified)
    assert len(oracle.verified) > 20
    assert (num_accepted > 0) == (is_right is not never)
    assert engine.scheduler.speculator is not None
    counts = engine.scheduler.speculator.counts
    assert (counts.num_drafts, counts.num_accepted_tokens) == (len(oracle.verified), num_accepted)
    assert sum(counts.accepted_per_position) == num_accepted


def repeating_requests() -> list[Request]:
    variants: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 1.0, "seed": 5, "logprobs": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6},
        {"temperature": 1.0, "presence_penalty": 0.5, "seed": 7},
    ]
    return [
        make_request(f"r{index}", prompt_of(30 + 9 * index, index), max_tokens=90, **variants[index % 4])
        for index in range(8)
    ]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [64, 24])
def test_prompt_lookup_gives_the_same_bits_in_fewer_steps(num_blocks: int, steps_ahead: int) -> None:
    reference = alone(repeating_requests(), period=7)
    engine = make_engine(DecodePolicy(), period=7, num_blocks=num_blocks, steps_ahead=steps_ahead, speculation=NGRAM)
    assert_same(finish_checked(engine, repeating_requests()), reference)
    load = engine.load()
    assert 0 < load.spec_accepted_tokens < load.spec_draft_tokens
    assert load.spec_accepted_per_position[0] > load.spec_accepted_per_position[-1] > 0
    assert (load.preemptions > 0) == (num_blocks == 24)
    plain = make_engine(DecodePolicy(), period=7, num_blocks=num_blocks, steps_ahead=steps_ahead)
    finish(plain, repeating_requests())
    assert _num_steps(engine) < _num_steps(plain)


def _num_steps(engine: Engine) -> int:
    model = engine._runner._model  # type: ignore[attr-defined]
    assert isinstance(model, FakeModel)
    return len(model.num_rows)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 30), st.booleans(), st.booleans()), min_size=1, max_size=6
    ),
    wrong=st.sets(st.tuples(st.integers(0, 80), st.integers(0, 6)), max_size=60),
    num_blocks=st.integers(16, 40),
    budget=st.integers(8, 80),
    max_tokens=st.integers(1, 7),
    steps_ahead=st.integers(0, 1),
    cancelled_at=st.none() | st.integers(0, 15),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_guessed_whenever_it_is_cancelled(
    requests: list[tuple[int, int, bool, bool]],
    wrong: set[tuple[int, int]],
    num_blocks: int,
    budget: int,
    max_tokens: int,
    steps_ahead: int,
    cancelled_at: int | None,
) -> None:
    asked = [
        make_request(
            f"r{index}",
            prompt_of(length, index % 2),  # some are equal: their blocks are shared
            max_tokens=count,
            temperature=float(is_sampled),
            seed=index,
            logprobs=1 if has_logprobs else None,
        )
        for index, (length, count, is_sampled, has_logprobs) in enumerate(requests)
    ]
    reference = alone(asked)
    engine = make_engine(
        DecodePolicy(), num_blocks=num_blocks, max_batched_tokens=budget, steps_ahead=steps_ahead, max_num_sequences=5
    )
    speculate_with(engine, Oracle(asked, reference, lambda *at: at not in wrong), max_tokens)
    for request in asked:
        engine.add_request(request)
    outcomes: dict[str, Outcome] = {}
    for step in range(1000):
        if step == cancelled_at:
            engine.cancel("r0", 0)
        if not engine.has_work():
            break
        collect(outcomes, engine.step())
        engine.blocks.check_integrity()
        check_stored(engine)
    if cancelled_at is not None and outcomes["r0"].last.finish_reason is FinishReason.CANCELLED:
        gone = outcomes.pop("r0")
        whole = reference.pop("r0")
        assert gone.token_ids == whole.token_ids[: len(gone.token_ids)]
    assert_same(outcomes, reference)
    assert engine.blocks.num_free == engine.num_blocks
    check_cached(engine, [(*each.token_ids, *alone([each])[each.request_id].token_ids) for each in asked])


# ---- ends inside of what was accepted


def chunk_sizes(outcome: Outcome) -> list[int]:
    return [len(chunk.token_ids) for chunk in outcome.chunks]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_stop_token_among_the_accepted_ends_the_request_there(steps_ahead: int) -> None:
    whole = make_request("a", prompt_of(20), max_tokens=30, ignore_eos=True)
    text = alone([whole])["a"].token_ids
    stop = text[7]
    expected = text[: text.index(stop) + 1]
    request = make_request("a", prompt_of(20), max_tokens=30, ignore_eos=True, stop_token_ids=(stop,), logprobs=1)
    engine = make_engine(DecodePolicy(), steps_ahead=steps_ahead)
    oracle = speculate_with(engine, Oracle([whole], {"a": Outcome(text)}))
    outcome = finish_checked(engine, [request])["a"]
    assert outcome.token_ids == expected
    assert [each.token_id for each in outcome.logprobs] == expected
    assert (outcome.last.finish_reason, outcome.last.stop_token_id) == (FinishReason.STOP, stop)
    drafts, right = oracle.verified[-1]
    assert right == drafts > 0, "guesses behind the stop token were right, too"
    assert outcome.last.index + len(outcome.last.token_ids) == len(expected)


def test_a_stop_token_that_fills_a_block_is_not_offered_to_others() -> None:
    """Without speculation its KV would not be there: the cache holds the same in both."""
    whole = make_request("a", prompt_of(2 * BLOCK_SIZE - 4), max_tokens=30, ignore_eos=True)
    text = alone([whole])["a"].token_ids
    request = make_request(
        "a", whole.token_ids, max_tokens=30, ignore_eos=True, stop_token_ids=(text[3],), temperature=0.0
    )
    assert text.index(text[3]) == 3, "the stop token is the last of its block"
    found = []
    for is_speculating in (False, True):
        engine = make_engine(DecodePolicy())
        if is_speculating:
            speculate_with(engine, Oracle([whole], {"a": Outcome(text)}))
        finish(engine, [request])
        found.append(check_cached(engine, [(*whole.token_ids, *text)]))
    assert found == [1, 1]


def test_eos_and_min_tokens_within_drafts() -> None:
    """EOS has a bias that makes it win as soon as min_tokens allows it."""
    request = make_request("a", prompt_of(20), max_tokens=30, min_tokens=9, logit_bias=((EOS, 100.0),), logprobs=0)
    reference = alone([request])
    assert len(reference["a"].token_ids) == 10
    engine = make_engine(DecodePolicy())
    oracle = speculate_with(engine, Oracle([request], reference))
    assert_same(finish_checked(engine, [request]), reference)
    assert max(count for _, count in oracle.verified) >= 4


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6, 7, 12])
def test_max_tokens_within_drafts(max_tokens: int) -> None:
    request = make_request("a", prompt_of(20), max_tokens=max_tokens, ignore_eos=True)
    reference = alone([request])
    engine = make_engine(DecodePolicy())
    oracle = speculate_with(engine, Oracle([request], reference))
    outcomes = finish_checked(engine, [request])
    assert_same(outcomes, reference)
    assert outcomes["a"].last.finish_reason is FinishReason.LENGTH
    assert sum(chunk_sizes(outcomes["a"])) == max_tokens
    assert all(drafts == right for drafts, right in oracle.verified), "nothing was guessed beyond the end"
    assert len(outcomes["a"].chunks) < max_tokens or max_tokens <= 2


def test_the_end_of_the_context_within_drafts() -> None:
    request = make_request("a", prompt_of(245), max_tokens=100, ignore_eos=True)
    reference = alone([request])
    engine = make_engine(DecodePolicy())
    speculate_with(engine, Oracle([request], reference), max_tokens=20)
    outcomes = finish_checked(engine, [request])
    assert_same(outcomes, reference)
    assert (outcomes["a"].last.finish_reason, len(outcomes["a"].token_ids)) == (FinishReason.LENGTH, 11)


def test_one_chunk_carries_all_tokens_of_a_step() -> None:
    request = make_request("a", prompt_of(20), max_tokens=16, logprobs=2, ignore_eos=True)
    reference = alone([request])
    engine = make_engine(DecodePolicy())
    speculate_with(engine, Oracle([request], reference))
    outcome = finish_checked(engine, [request])["a"]
    assert chunk_sizes(outcome) == [1, 5, 7, 3]  # the prompt; 4 drafts; 6 drafts; what is left
    assert [chunk.index for chunk in outcome.chunks] == [0, 1, 6, 13]
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in outcome.chunks)
    assert engine.load().generation_tokens == 16


@pytest.mark.parametrize("bias", [59.5, 100.0])
def test_not_a_number_behind_accepted_drafts_ends_the_request_where_it_would_have_ended(bias: float) -> None:
    """The token with the bias is drawn fourth, or first; its successor's logits are not numbers."""
    request = make_request("a", prompt_of(20), max_tokens=30, logit_bias=((NAN_TOKEN, bias),), ignore_eos=True)
    reference = alone([request])
    assert reference["a"].last.finish_reason is FinishReason.ERROR
    assert len(reference["a"].token_ids) == (4 if bias < 60 else 1)
    engine = make_engine(DecodePolicy())
    oracle = speculate_with(engine, Oracle([request], reference))
    outcome = finish_checked(engine, [request])["a"]
    assert oracle.proposals
    assert outcome.token_ids == reference["a"].token_ids
    assert outcome.last == reference["a"].last
    assert check_cached(engine, [(*request.token_ids, *outcome.token_ids)]) == 0


# ---- blocks


@pytest.mark.parametrize("length", range(2 * BLOCK_SIZE - 8, 2 * BLOCK_SIZE + 3))
@pytest.mark.parametrize("is_right", [always, never, lambda position, place: position % BLOCK_SIZE != 0])
def test_block_boundaries(length: int, is_right: Any) -> None:
    request = make_request("a", prompt_of(length), max_tokens=2 * BLOCK_SIZE, ignore_eos=True, logprobs=1)
    reference = alone([request])
    engine = make_engine(DecodePolicy())
    speculate_with(engine, Oracle([request], reference, is_right))
    for _ in range(2):  # the second time on what the first left in the prefix cache
        assert_same(finish_checked(engine, [request]), reference)
    assert engine.load().cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_blocks_grown_for_wrong_guesses_are_given_back() -> None:
    request = make_request("a", prompt_of(BLOCK_SIZE - 4), max_tokens=20, ignore_eos=True)
    reference = alone([request])
    engine = make_engine(DecodePolicy())
    speculate_with(engine, Oracle([request], reference, never), max_tokens=6)
    engine.add_request(request)
    while engine.has_work():
        engine.step()
        for sequence in engine.scheduler.running:
            assert sequence.table is not None
            assert len(sequence.table.block_ids) == engine.blocks.num_blocks_for(len(sequence.token_ids))


def test_drafts_take_no_block_that_a_neighbour_needs_meanwhile() -> None:
    """Nine sequences will need a second block each, and nine are free, when a tenth guesses across the end of
    its first one. All are launched ahead, so what the guess takes is not given back in time."""
    first = make_request("first", prompt_of(14), max_tokens=30, ignore_eos=True)
    engine = make_engine(DecodePolicy(), num_blocks=19, steps_ahead=1, max_batched_tokens=200, max_num_sequences=16)
    oracle = speculate_with(engine, Oracle([first], alone([first]), never))
    engine.add_request(first)
    for at in range(9):
        engine.add_request(make_request(f"r{at}", prompt_of(12, at), max_tokens=6, ignore_eos=True))
    ends: dict[str, int] = {}
    for step in range(MOST_STEPS):
        for event in engine.step() if engine.has_work() else ():
            assert isinstance(event, TokenChunk)
            ends |= {event.request_id: step} if event.finish_reason else {}
    assert oracle.proposals
    assert len({ends[f"r{at}"] for at in range(9)}) == 1


def test_guesses_across_a_block_boundary_where_all_others_are_taken() -> None:
    """The one sequence fits the pool exactly: guesses fill the last block and stop there."""
    request = make_request("a", prompt_of(240), max_tokens=100, ignore_eos=True)
    reference = alone([request])
    engine = make_engine(DecodePolicy(), num_blocks=16)
    oracle = speculate_with(engine, Oracle([request], reference), max_tokens=20)
    assert_same(finish_checked(engine, [request]), reference)
    assert oracle.verified
    assert engine.load().preemptions == 0


def test_drafts_leave_half_of_the_budget_to_prompts() -> None:
    first = make_request("first", prompt_of(4), max_tokens=100, ignore_eos=True)
    engine = make_engine(DecodePolicy(), max_batched_tokens=17)
    oracle = speculate_with(engine, Oracle([first], alone([first])), max_tokens=60)
    engine.add_request(first)
    while len(oracle.proposals) < 3:
        engine.step()
    assert oracle.proposals[-1][1] == 16, "alone it may have all"
    engine.add_request(make_request("prompt", prompt_of(60, 1)))
    engine.step()
    assert oracle.proposals[-1] == ("first", 8)
    assert engine.scheduler.running[1].num_computed_tokens == 8


# ---- neighbours and lifetimes


def test_siblings_speculate_on_their_own() -> None:
    requests = [
        make_request(f"r{seed}", prompt_of(40), max_tokens=30, temperature=1.0, seed=seed, logprobs=1)
        for seed in range(4)
    ]
    reference = alone(requests)
    assert len({tuple(outcome.token_ids) for outcome in reference.values()}) == 4
    engine = make_engine(DecodePolicy())
    speculate_with(engine, Oracle(requests, reference, lambda position, place: (position + place) % 4 > 0))
    assert_same(finish_checked(engine, requests), reference)


def test_what_draws_by_history_and_prompts_are_not_speculated() -> None:
    requests = [
        make_request("plain", prompt_of(9), max_tokens=20, ignore_eos=True),
        make_request("penalty", prompt_of(9, 1), max_tokens=20, repetition_penalty=1.2, ignore_eos=True),
        make_request("long", prompt_of(200, 2), max_tokens=2),
    ]
    reference = alone(requests)
    engine = make_engine(DecodePolicy(), max_batched_tokens=24)
    oracle = speculate_with(engine, Oracle(requests, reference))
    assert_same(finish_checked(engine, requests), reference)
    assert {name for name, _ in oracle.proposals} == {"plain"}


def test_a_prefill_engine_never_speculates() -> None:
    engine = make_engine(PrefillPolicy(), speculation=NGRAM)
    assert engine.scheduler.speculator is None


def test_a_loaded_request_speculates_on_its_prompt_at_once() -> None:
    request = make_request("a", prompt_of(40), max_tokens=30, logprobs=1, ignore_eos=True)
    reference = alone([request])["a"]
    prefill, decode = make_engine(PrefillPolicy()), make_engine(DecodePolicy())
    oracle = speculate_with(decode, Oracle([request], {"a": reference}))
    _, finished = run_prefill(prefill, request)
    hand_over(prefill, decode, finished, request)
    outcomes: dict[str, Outcome] = {}
    collect(outcomes, decode.step())
    assert oracle.proposals == [("a", 4)]
    while decode.has_work():
        collect(outcomes, decode.step())
    assert [*finished.chunk.token_ids, *outcomes["a"].token_ids] == reference.token_ids
    assert [*finished.chunk.logprobs, *outcomes["a"].logprobs] == reference.logprobs


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_cancelling_with_drafts_in_flight_frees_everything(steps_ahead: int) -> None:
    requests = [make_request(f"r{at}", prompt_of(30, at), max_tokens=40, ignore_eos=True) for at in range(3)]
    reference = alone(requests)
    for num_steps in range(1, 10):
        engine = make_engine(DecodePolicy(), steps_ahead=steps_ahead)
        speculate_with(engine, Oracle(requests, reference, lambda position, place: place < 3))
        for request in requests:
            engine.add_request(request)
        outcomes: dict[str, Outcome] = {}
        for _ in range(num_steps):
            collect(outcomes, engine.step())
        engine.cancel("r1", 0)
        while engine.has_work():
            collect(outcomes, engine.step())
            engine.blocks.check_integrity()
        assert outcomes["r1"].last.finish_reason is FinishReason.CANCELLED
        assert outcomes["r0"].token_ids == reference["r0"].token_ids
        assert outcomes["r2"].token_ids == reference["r2"].token_ids
        assert engine.blocks.num_free == engine.num_blocks


# ---- a step ahead


def test_text_without_repetition_runs_ahead_as_without_speculation() -> None:
    requests = [make_request(f"r{at}", prompt_of(30, at), max_tokens=60, temperature=1.0, seed=at) for at in range(3)]
    rows = []
    for speculation in (SpeculationConfig(), SpeculationConfig(method="ngram")):
        engine = make_engine(DecodePolicy(), steps_ahead=1, speculation=speculation)
        finish(engine, requests)
        model = engine._runner._model  # type: ignore[attr-defined]
        assert isinstance(model, FakeModel)
        rows.append(model.num_rows)
        assert engine.load().spec_draft_tokens == 0
    assert rows[0] == rows[1]


def test_a_predicted_text_waits_for_its_token_and_then_speculates() -> None:
    request = make_request("a", prompt_of(20), max_tokens=60, ignore_eos=True)
    engine = make_engine(DecodePolicy(), steps_ahead=1, period=5, speculation=NGRAM)
    engine.add_request(request)
    has_run_ahead = has_waited = False
    outcomes: dict[str, Outcome] = {}
    while engine.has_work():
        collect(outcomes, engine.step())
        for sequence in engine.scheduler.running:
            has_run_ahead |= sequence.num_in_flight == 1 and sequence.num_pending_drafts == 0
            has_waited |= sequence.num_pending_drafts > 0
    assert has_run_ahead
    assert has_waited
    assert outcomes["a"].token_ids == alone([request], period=5)["a"].token_ids


def test_sequences_that_wait_do_not_lose_every_second_step() -> None:
    """Most of what runs waits for its tokens: they are learned before the next step is prepared, so all
    take part in every step."""
    requests = [make_request(f"r{at}", prompt_of(20, at), max_tokens=30, ignore_eos=True) for at in range(4)]
    reference = alone(requests)
    engine = make_engine(DecodePolicy(), steps_ahead=1)
    speculate_with(engine, Oracle(requests[1:], {key: reference[key] for key in ("r1", "r2", "r3")}, never))
    speculator = engine.scheduler.speculator
    assert speculator is not None
    for request in requests:
        engine.add_request(request)
    model = engine._runner._model  # type: ignore[attr-defined]
    assert isinstance(model, FakeModel)
    outcomes: dict[str, Outcome] = {}
    while engine.has_work():
        collect(outcomes, engine.step())
    assert_same(outcomes, reference)
    assert len(model.num_rows) <= 33


def test_run_all_of_the_fakes_bounds_its_steps() -> None:
    engine = make_engine(DecodePolicy(), speculation=NGRAM)
    engine.add_request(make_request("a", prompt_of(20), max_tokens=60, ignore_eos=True))
    assert run_all(engine)["a"].last.finish_reason is FinishReason.LENGTH
