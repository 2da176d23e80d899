"""Prompt lookup: what is found, what is guessed, and when nothing is."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.block_manager import BlockManager
from cluster.engine.sequence import Sequence, make_sequence
from cluster.engine.speculation import ngram_index
from cluster.engine.speculation.ngram import MOST_NEEDED, NgramProposer
from cluster.engine.speculation.ngram_index import NgramIndex
from cluster.engine.speculation.speculator import FIRST_LENGTH, Speculator
from tests.unit.engine_fakes import Outcome, make_request
from tests.unit.speculation_fakes import Oracle


def sequence_of(*token_ids: int, max_tokens: int = 1000, **sampling: Any) -> Sequence:
    request = make_request("a", token_ids, max_tokens=max_tokens, **sampling)
    return make_sequence(request, block_size=16, max_model_len=10_000, eos_token_ids=(), is_loaded=False)


# ---- the index


def defined(tokens: list[int], min_length: int, max_length: int) -> int | None:
    """The longest match, the most recent among equals; by comparing everything with everything."""
    best: tuple[int, int] | None = None
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(max_length, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= min_length:
            best = max(best or (0, 0), (length, end))
    return None if best is None else best[1] + 1


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    min_length=st.integers(1, 4),
    extra=st.integers(0, 3),
    cut=st.integers(0, 60),
)
@settings(deadline=None)
def test_lookups_find_what_the_definition_finds(tokens: list[int], min_length: int, extra: int, cut: int) -> None:
    text = array("i", tokens[:cut])
    index = NgramIndex(text, min_length, min_length + extra)
    assert index.catch_up()
    text.extend(tokens[cut:])
    assert index.catch_up()
    expected = defined(tokens, min_length, min_length + extra)
    found = index.find()
    if len(tokens) <= ngram_index.MAX_CANDIDATES:
        assert found == expected
    elif found is not None:  # few places are compared, but each is a match
        assert tokens[found - min_length : found] == tokens[len(tokens) - min_length :]
    assert (found is None) == (expected is None)


@pytest.mark.parametrize("vocabulary", [2, 50, 5000])
def test_many_tokens_at_once_are_linked_as_one_by_one(vocabulary: int) -> None:
    tokens = [(position * position * 31 + position // 7) % vocabulary for position in range(3000)]
    at_once = NgramIndex(array("i", tokens), 3, 5)
    assert at_once.catch_up()
    one_by_one = NgramIndex(array("i", tokens), 3, 5)
    for position in range(len(tokens)):
        one_by_one._take_in(position)
    assert at_once._previous == one_by_one._previous
    assert at_once._head == one_by_one._head


def test_a_long_text_is_taken_in_over_several_calls() -> None:
    tokens = array("i", range(2 * ngram_index.MAX_NEW_TOKENS + 5))
    index = NgramIndex(tokens, 2, 4)
    assert [index.catch_up() for _ in range(4)] == [False, False, True, True]
    assert index.find() is None
    tokens.extend((7, 8, 9))
    assert index.catch_up()
    assert index.find() == 10


# ---- the proposer


def offered(proposer: NgramProposer, sequence: Sequence, limit: int = 4) -> tuple[int, ...]:
    count = proposer.offer(sequence, limit)
    return proposer.propose([(sequence, count)])[0] if count else ()


def test_it_is_silent_until_a_lookup_has_come_true() -> None:
    sequence = sequence_of(1, 2, 3, 4, 5, 6, 9, 1, 2)
    proposer = NgramProposer(2, 4)
    assert offered(proposer, sequence) == ()
    sequence.token_ids.append(3)
    assert offered(proposer, sequence) == (4, 5, 6, 9)
    sequence.token_ids.append(7)
    assert offered(proposer, sequence) == ()


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_loop_is_continued_beyond_the_end_of_the_text(period: int) -> None:
    loop = [*range(period)] * 6
    proposer, sequence = NgramProposer(3, 8), sequence_of(*loop)
    assert offered(proposer, sequence) == ()
    sequence.token_ids.append(loop[len(loop) % period])
    expected = [(len(loop) + 1 + place) % period for place in range(9)]
    assert offered(proposer, sequence, 9) == tuple(expected)


def test_wrong_guesses_make_it_ask_for_more_right_lookups() -> None:
    proposer, sequence = NgramProposer(2, 4), sequence_of(*range(100), 50, 51)
    offered(proposer, sequence)
    silent = []
    for start in (5, 20, 35, 60, 80):
        num_tokens = len(sequence.token_ids)
        while not offered(proposer, sequence):
            sequence.token_ids.append(sequence.token_ids[-1] + 1)
        silent.append(len(sequence.token_ids) - num_tokens)
        proposer.on_verified(sequence, 4, 0)
        sequence.token_ids.extend((1000 + start, start, start + 1))
        offered(proposer, sequence)
    assert silent == [1, 2, 4, MOST_NEEDED, MOST_NEEDED]
    for _ in range(3):
        proposer.on_verified(sequence, 4, 1)
    sequence.token_ids.extend((2000, 48, 49))
    assert not offered(proposer, sequence)
    sequence.token_ids.append(50)
    assert offered(proposer, sequence), "trusted again"


def test_waiting_in_vain_counts_as_a_wrong_guess() -> None:
    proposer, sequence = NgramProposer(2, 4), sequence_of(*range(100), 50, 51)
    offered(proposer, sequence)
    sequence.token_ids.append(52)
    sequence.num_pending_tokens = 1
    assert proposer.offer(sequence, 4) == 4  # so it waits
    sequence.num_pending_tokens = 0
    sequence.token_ids.append(7)  # another token comes
    assert not offered(proposer, sequence)
    for token in (60, 61, 62):
        sequence.token_ids.append(token)
        assert not offered(proposer, sequence), "one right lookup is not enough any more"
    sequence.token_ids.append(63)
    assert offered(proposer, sequence) == (64, 65, 66, 67)


def test_text_without_repetition_gets_no_guesses() -> None:
    proposer = NgramProposer(2, 4)
    sequence = sequence_of(1)
    for step in range(500):
        sequence.token_ids.append((step * step * 7919) % 49_152)
        assert not offered(proposer, sequence)


def test_a_sequence_without_blocks_leaves_nothing_behind() -> None:
    fixture = Fixture()
    proposer = fixture.speculator.proposer = NgramProposer(2, 4)
    fixture.propose()
    fixture.speculator.on_verified(fixture.sequence, 2, 1)
    assert len(proposer._followers) == len(fixture.speculator._lengths) == 1
    fixture.speculator.on_released(fixture.sequence)
    assert not proposer._followers
    assert not fixture.speculator._lengths


# ---- the speculator


class Fixture:
    """One sequence with blocks and an oracle."""

    def __init__(self, *, num_blocks: int = 64, num_prompt: int = 10, **options: Any) -> None:
        self.blocks = BlockManager(num_blocks, 16)
        self.sequence = sequence_of(*range(num_prompt), **options)
        self.sequence.table = self.blocks.allocate(self.sequence.chain, num_prompt, 0)
        self.speculator = Speculator(Oracle([self.sequence.request], {"a": ANSWER}), 16)

    def propose(self, budget: int = 100, keep_free: int = 0) -> int:
        [drafts] = self.speculator.propose([self.sequence], self.blocks, budget, keep_free=keep_free)
        return len(drafts)


ANSWER = Outcome(list(range(2000)))


def test_the_next_proposal_is_twice_what_was_accepted() -> None:
    fixture = Fixture()
    lengths = [fixture.propose()]
    for num_accepted in (4, 8, 16, 5, 10, 0, 1, 1):
        fixture.speculator.on_verified(fixture.sequence, lengths[-1], min(num_accepted, lengths[-1]))
        lengths.append(fixture.propose())
    assert lengths == [FIRST_LENGTH, 8, 16, 16, 10, 16, 1, 2, 2]


def test_a_short_proposal_that_came_true_does_not_shrink_the_next() -> None:
    fixture = Fixture()
    fixture.speculator.on_verified(fixture.sequence, 8, 8)
    assert fixture.propose(budget=2) == 2
    fixture.speculator.on_verified(fixture.sequence, 2, 2)
    assert fixture.propose() == 16


def test_a_budget_is_shared() -> None:
    blocks = BlockManager(64, 16)
    sequences = [sequence_of(*range(10)) for _ in range(3)]
    for each in sequences:
        each.table = blocks.allocate(each.chain, 10, 0)
    speculator = Speculator(Oracle([each.request for each in sequences], {"a": ANSWER}), 16)

    def lengths(budget: int) -> list[int]:
        return [len(drafts) for drafts in speculator.propose(sequences, blocks, budget, keep_free=0)]

    assert [lengths(budget) for budget in (0, 2, 9, 100)] == [[0, 0, 0], [1, 1, 0], [3, 3, 3], [4, 4, 4]]


def test_no_guess_beyond_the_last_token_that_may_be_drawn() -> None:
    assert Fixture(max_tokens=3).propose() == 2
    assert Fixture(max_tokens=1).propose() == 0


def test_guesses_take_new_blocks_only_while_enough_remain() -> None:
    assert Fixture(num_blocks=3, num_prompt=14).propose(keep_free=1) == 4
    assert Fixture(num_blocks=3, num_prompt=14).propose(keep_free=2) == 2
    fixture = Fixture(num_blocks=1, num_prompt=16)
    assert fixture.propose() == 0
    fixture.blocks.check_integrity()


def test_what_draws_by_history_or_has_pending_tokens_gets_no_drafts() -> None:
    assert Fixture(presence_penalty=0.5).propose() == 0
    fixture = Fixture()
    fixture.sequence.num_pending_tokens = 1
    assert fixture.speculator.awaits_token(fixture.sequence)
    assert fixture.propose() == 0
