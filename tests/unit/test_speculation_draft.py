"""A draft model: the same bits, and it guesses right wherever it can.

The fake draft model is the target, except that it errs at every fifth position. Its tokens depend on every
KV row it reads. So a guess that is wrong elsewhere means that the draft's KV was wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_manager import BlockManager
from cluster.engine.config import SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.model_runner import ModelRunner
from cluster.engine.sequence import Sequence, make_sequence
from cluster.engine.speculation.draft_kv import DraftKV
from cluster.engine.speculation.draft_model import LONGEST_PAUSE, DraftModelProposer
from cluster.errors import StartupError
from cluster.types import Request
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.unit.engine_fakes import (
    BLOCK_SIZE,
    FakeModel,
    FakeShape,
    Outcome,
    collect,
    make_engine,
    make_request,
    prompt_of,
)
from tests.unit.test_engine import finish, hand_over, mixed_requests, run_prefill
from tests.unit.test_speculation import alone, assert_same, finish_checked

DRAFT = SpeculationConfig(method="draft", num_tokens=6, draft_model="given to the engine")
ERRS_EVERY = 5


class Watched:
    """Passes a proposer's proposals on, and checks each against the text as it will be."""

    def __init__(self, engine: Engine, requests: ListLike[Request], reference: dict[str, Outcome]) -> None:
        assert engine.scheduler.speculator is not None
        self._inner = engine.scheduler.speculator.proposer
        self._texts = {each.request_id: (*each.token_ids, *reference[each.request_id].token_ids) for each in requests}
        self.num_right = self.num_wrong = 0
        engine.scheduler.speculator.proposer = self

    def prepare(self, sequences: ListLike[Sequence]) -> None:
        self._inner.prepare(sequences)

    def offer(self, sequence: Sequence, limit: int) -> int:
        return self._inner.offer(sequence, limit)

    def propose(self, granted: ListLike[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        proposals = self._inner.propose(granted)
        for (sequence, count), guesses in zip(granted, proposals, strict=True):
            assert len(guesses) == count
            self._check(sequence, guesses)
        return proposals

    def on_released(self, sequence: Sequence) -> None:
        self._inner.on_released(sequence)

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        self._inner.on_verified(sequence, num_drafts, num_accepted)

    def _check(self, sequence: Sequence, guesses: tuple[int, ...]) -> None:
        start = len(sequence.token_ids)
        for position, guess in enumerate(guesses, start):
            text = self._texts[sequence.request.request_id]
            if position >= len(text):  # the text ended with a stop token
                return
            if guess != text[position]:
                assert position % ERRS_EVERY == 0, f"a wrong guess for position {position}"
                self.num_wrong += 1
                return
            self.num_right += 1


def drafting_engine(**options: Any) -> Engine:
    return make_engine(DecodePolicy(), speculation=DRAFT, draft_model=FakeModel(errs_every=ERRS_EVERY), **options)


def proposer_of(engine: Engine) -> DraftModelProposer:
    assert engine.scheduler.speculator is not None
    proposer = engine.scheduler.speculator.proposer
    assert isinstance(proposer, DraftModelProposer)
    return proposer


@pytest.fixture(scope="module")
def reference() -> dict[str, Outcome]:
    return alone(mixed_requests())


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize(
    ("max_batched_tokens", "num_blocks", "max_num_sequences"), [(37, 64, 8), (97, 16, 16), (64, 21, 16)]
)
def test_bits_and_guesses_do_not_depend_on_chunks_neighbours_or_preemption(
    reference: dict[str, Outcome], max_batched_tokens: int, num_blocks: int, max_num_sequences: int, steps_ahead: int
) -> None:
    engine = drafting_engine(
        max_batched_tokens=max_batched_tokens,
        num_blocks=num_blocks,
        max_num_sequences=max_num_sequences,
        steps_ahead=steps_ahead,
    )
    watched = Watched(engine, mixed_requests(), reference)
    for _ in range(2):  # the second time on what is left in the prefix cache
        assert_same(finish_checked(engine, mixed_requests()), reference)
    assert watched.num_right > 100
    assert watched.num_wrong > 10
    assert engine.load().spec_accepted_tokens >= watched.num_right
    assert (engine.load().preemptions > 0) == (num_blocks < 64)


@given(
    requests=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40), st.booleans()), min_size=1, max_size=6),
    num_blocks=st.integers(16, 40),
    budget=st.integers(8, 80),
    steps_ahead=st.integers(0, 1),
    cancelled_at=st.none() | st.integers(0, 15),
)
@settings(max_examples=40, deadline=None)
def test_every_guess_is_right_where_the_draft_model_does_not_err(
    requests: list[tuple[int, int, bool]], num_blocks: int, budget: int, steps_ahead: int, cancelled_at: int | None
) -> None:
    asked = [
        make_request(f"r{at}", prompt_of(length, at % 2), max_tokens=count, temperature=float(is_sampled), seed=at)
        for at, (length, count, is_sampled) in enumerate(requests)
    ]
    reference = alone(asked)
    engine = drafting_engine(
        num_blocks=num_blocks, max_batched_tokens=budget, steps_ahead=steps_ahead, max_num_sequences=5
    )
    Watched(engine, asked, reference)
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
    assert engine.blocks.num_free == engine.num_blocks
    for request_id, outcome in outcomes.items():
        if request_id != "r0" or cancelled_at is None:
            assert outcome.token_ids == reference[request_id].token_ids


def test_a_loaded_request_has_its_prompt_computed_by_the_draft_model_in_chunks() -> None:
    request = make_request("a", prompt_of(100), max_tokens=60, temperature=1.0, logprobs=1, ignore_eos=True)
    reference = alone([request])
    prefill, decode = make_engine(PrefillPolicy(), max_batched_tokens=128), drafting_engine(max_batched_tokens=40)
    watched = Watched(decode, [request], reference)
    _, finished = run_prefill(prefill, request)
    hand_over(prefill, decode, finished, request)
    outcomes: dict[str, Outcome] = {}
    num_before = 0
    while decode.has_work():
        collect(outcomes, decode.step())
        num_before += watched.num_right == 0
    assert num_before == 2, "40 of 101 tokens in a step"
    assert [*finished.chunk.token_ids, *outcomes["a"].token_ids] == reference["a"].token_ids
    assert [*finished.chunk.logprobs, *outcomes["a"].logprobs] == reference["a"].logprobs
    assert watched.num_right > 30


def test_what_the_prefix_cache_finds_need_not_be_computed_again() -> None:
    """A second request with the same prompt: the draft model computes the rest of it only."""
    draft_model = FakeModel(errs_every=ERRS_EVERY)
    engine = make_engine(DecodePolicy(), speculation=DRAFT, draft_model=draft_model, max_batched_tokens=256)
    for seed in range(2):
        draft_model.num_rows.clear()
        finish(engine, [make_request("a", prompt_of(100), max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)])
        assert draft_model.num_rows[0] == (100 if seed == 0 else 100 - 6 * BLOCK_SIZE)


def test_no_guess_beyond_the_context_of_the_draft_model() -> None:
    request = make_request("a", prompt_of(60), max_tokens=100, ignore_eos=True)
    too_long = make_request("b", prompt_of(90), max_tokens=20, ignore_eos=True)
    reference = alone([request, too_long])
    draft_model = FakeModel(FakeShape(max_position=80), errs_every=ERRS_EVERY)
    engine = make_engine(DecodePolicy(), speculation=DRAFT, draft_model=draft_model)
    watched = Watched(engine, [request, too_long], reference)
    assert_same(finish_checked(engine, [request, too_long]), reference)
    assert 5 < watched.num_right <= 20


def test_it_pauses_where_nothing_is_accepted_and_comes_back() -> None:
    """Shorter and shorter proposals, then none for a while, longer each time."""
    request = make_request("a", prompt_of(20), max_tokens=200, ignore_eos=True)
    draft_model = FakeModel(errs_every=1)
    engine = make_engine(DecodePolicy(), speculation=DRAFT, draft_model=draft_model)
    assert_same(finish_checked(engine, [request]), alone([request]))
    load = engine.load()
    assert load.spec_accepted_tokens <= 2
    assert 3 <= load.spec_drafts <= 12
    assert LONGEST_PAUSE < 100


def test_an_engine_without_its_draft_model_does_not_start() -> None:
    with pytest.raises(StartupError, match="no draft model was loaded"):
        make_engine(DecodePolicy(), speculation=DRAFT)


def test_both_pools_come_out_of_the_same_bytes() -> None:
    engine = drafting_engine(num_blocks=40)
    assert engine.num_blocks == 40
    runner = proposer_of(engine)._runner
    assert isinstance(runner, ModelRunner)
    pool = runner._kv_cache
    assert pool.num_blocks == 40
    assert pool.kv_NL2HSD.nbytes + engine.kv_cache.kv_NL2HSD.nbytes == engine.config.kv_cache_bytes
    with pytest.raises(StartupError, match="the draft model's KV included"):
        drafting_engine(num_blocks=15)


def test_a_sequence_that_has_lost_its_blocks_holds_nothing_in_the_draft_runner() -> None:
    """The runner may keep what it knows of a shadow as long as that has a table."""
    engine = drafting_engine()
    engine.add_request(make_request("a", prompt_of(20), max_tokens=30, ignore_eos=True))
    for _ in range(4):
        engine.step()
    [sequence] = engine.scheduler.running
    draftee = proposer_of(engine)._draftees[id(sequence)]
    assert draftee.shadow.table is sequence.table is not None
    engine.cancel("a", 0)
    assert draftee.shadow.table is None
    assert not proposer_of(engine)._draftees


# ---- the books of the draft's KV


class Books:
    def __init__(self, num_prompt: int = 40) -> None:
        self.blocks = BlockManager(16, BLOCK_SIZE)
        self.kv = DraftKV(self.blocks)
        self.sequence = self.make(num_prompt)

    def make(self, num_prompt: int) -> Sequence:
        request = make_request("a", tuple(range(num_prompt)), max_tokens=100)
        sequence = make_sequence(request, block_size=BLOCK_SIZE, max_model_len=1000, eos_token_ids=(), is_loaded=False)
        sequence.table = self.blocks.allocate(sequence.chain, num_prompt + 10, num_prompt - 1)
        return sequence


def test_guesses_count_as_far_as_they_come_true() -> None:
    for tokens, expected in (((7,), 40), ((1,), 41), ((1, 2, 9), 42), ((1, 2, 3, 4), 43)):
        books = Books()
        books.kv.on_computed(books.sequence, 40, guessed=(1, 2, 3))
        books.sequence.token_ids.extend(tokens)
        if len(books.sequence.token_ids) > expected:
            assert books.kv.num_stored(books.sequence) == expected


def test_another_table_begins_with_what_its_blocks_hold() -> None:
    books = Books()
    assert books.kv.num_stored(books.sequence) == 0
    books.kv.on_computed(books.sequence, 39)
    assert books.kv.num_stored(books.sequence) == 39
    assert books.sequence.table is not None
    books.blocks.register_computed(books.sequence.table, books.sequence.chain, 40)
    books.blocks.free(books.sequence.table)
    again = books.make(40)
    assert books.kv.num_stored(again) == 2 * BLOCK_SIZE
    assert again.table is not None
    books.blocks.free(again.table)
    books.blocks.reset_prefix_cache()
    other = books.blocks.allocate(BlockHashChain(array("i", range(200)), BLOCK_SIZE, b""), 200, 0)
    assert other is not None
    books.blocks.free(other)  # every block has been used for something else
    assert books.kv.num_stored(books.make(40)) == 0
