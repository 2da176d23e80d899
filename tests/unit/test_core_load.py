"""One load, under any order of events: one outcome, and blocks are given back only when nothing can land."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnector.core.load import (
    Abort,
    Commit,
    Fail,
    GiveBack,
    Judge,
    LedgerGood,
    LedgerNotFilled,
    LedgerWrongDigest,
    LoadEffect,
    LoadEvent,
    LoadPhase,
    LoadState,
    PeerConnected,
    Posted,
    ReadData,
    ReadDone,
    ReadLedger,
    Renew,
    Reserved,
    StartDraining,
    TellDone,
    Tick,
    TryReserve,
    step,
)

START = LoadState(lease_s=10.0, deadline=20.0)
CANCEL = Abort("cancelled", "x")


def play(*events: LoadEvent, state: LoadState = START, now: float = 1.0) -> tuple[LoadState, list[LoadEffect]]:
    effects: list[LoadEffect] = []
    for event in events:
        state, done = step(state, event, now)
        effects += done
    return state, effects


READING = (PeerConnected(), Reserved(needs_reads=True), Posted(2), ReadDone(), ReadDone(), Posted(1), ReadDone())


def test_the_straight_way() -> None:
    state, effects = play(*READING, LedgerGood())
    assert state.phase is LoadPhase.VERIFIED
    assert effects == [TryReserve(), ReadData(), ReadLedger(), Judge(), Commit(), TellDone()]


def test_nothing_to_read() -> None:
    state, effects = play(PeerConnected(), Reserved(needs_reads=False))
    assert effects == [TryReserve(), Commit(), TellDone()]
    assert state.phase is LoadPhase.VERIFIED


def test_the_ledger_is_read_only_after_all_data_has_landed() -> None:
    _, effects = play(PeerConnected(), Reserved(needs_reads=True), Posted(3), ReadDone(), ReadDone())
    assert ReadLedger() not in effects


def test_blocks_that_are_not_filled_are_read_again_after_a_pause() -> None:
    state, _ = play(*READING, LedgerNotFilled())
    assert play(Tick(), state=state, now=1.001)[1][-1:] != [ReadData()]
    state, effects = play(Tick(), state=state, now=1.1)
    assert ReadData() in effects
    state, effects = play(Posted(2), ReadDone(), ReadDone(), Posted(1), ReadDone(), LedgerGood(), state=state)
    assert effects == [ReadLedger(), Judge(), Commit(), TellDone()]


def test_a_wrong_digest_is_read_again_twice_then_believed() -> None:
    again = (Posted(1), ReadDone(), Posted(1), ReadDone(), LedgerWrongDigest())
    state, effects = play(*READING, LedgerWrongDigest(), *again)
    assert effects.count(ReadData()) == 3
    state, effects = play(*again, state=state)
    assert effects[-3:-1] == [GiveBack(), TellDone()]
    assert isinstance(effects[-1], Fail)
    assert effects[-1].code == "digest_mismatch"


def test_abort_while_reading_drains_and_fails_at_once() -> None:
    state, effects = play(PeerConnected(), Reserved(needs_reads=True), Posted(2), CANCEL)
    assert state.phase is LoadPhase.DRAINING
    assert effects[-2:] == [StartDraining(), Fail("cancelled", "x")]
    state, effects = play(ReadDone(), CANCEL, Tick(), state=state, now=99.0)
    assert effects == []  # a timeout alone frees nothing that can still be written
    state, effects = play(Abort("transfer_failed", "y"), state=state)
    assert (state.phase, effects) == (LoadPhase.DRAINING, [])
    state, effects = play(ReadDone(), state=state)
    assert (state.phase, effects) == (LoadPhase.FREE, [GiveBack(), TellDone()])


def test_what_a_failed_read_may_still_write_is_kept_until_it_has_landed() -> None:
    state, effects = play(PeerConnected(), Reserved(needs_reads=True), Posted(1), Abort("transfer_failed", "y"))
    assert state.phase is LoadPhase.DRAINING
    assert effects[-2:] == [StartDraining(), Fail("transfer_failed", "y")]
    state, effects = play(ReadDone(), state=state)
    assert (state.phase, effects) == (LoadPhase.FREE, [GiveBack(), TellDone()])


@pytest.mark.parametrize("num_events", range(1, 5))
def test_every_phase_has_a_bound(num_events: int) -> None:
    """READs that hang are the transport's to bound, but the request is told all the same."""
    state, _ = play(*READING[:num_events])
    _, effects = play(Tick(), state=state, now=20.0)
    assert any(isinstance(effect, Fail) for effect in effects)


def test_a_load_that_waits_renews_the_lease() -> None:
    state, _ = play(PeerConnected())
    renewals = 0
    for tick in range(100):
        state, effects = step(state, Tick(), 1.0 + tick * 0.1)
        renewals += effects.count(Renew())
        assert TryReserve() in effects
    assert renewals == 4


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), num_steps=st.integers(1, 60))
def test_any_history_has_one_outcome_and_frees_nothing_too_early(seed: int, num_steps: int) -> None:
    """A shell that behaves, a world that does not: events are drawn among those that can happen."""
    world = random.Random(seed)
    state, now = START, 0.0
    is_reserved, num_running = False, 0
    pending: list[LoadEffect] = []
    outcomes: list[LoadEffect] = []
    shaken = False

    def feed(event: LoadEvent) -> None:
        nonlocal state, is_reserved
        state, effects = step(state, event, now)
        for effect in effects:
            match effect:
                case Commit():
                    assert num_running == 0
                    assert is_reserved
                    outcomes.append(effect)
                    is_reserved = False
                case Fail():
                    outcomes.append(effect)
                case GiveBack():
                    assert num_running == 0, "a READ may still land"
                    is_reserved = False
                case _:
                    pending.append(effect)

    for turn in range(num_steps + 400):
        is_ending = turn >= num_steps
        now += 0.01 if not is_ending else 1.0
        if pending:
            match pending.pop(0):
                case TryReserve() if state.phase is LoadPhase.WAITING and (is_ending or world.random() < 0.5):
                    is_reserved = True
                    feed(Reserved(needs_reads=world.random() < 0.9))
                case ReadData() | ReadLedger() if state.phase in (LoadPhase.RESERVED, LoadPhase.LOADING):
                    count = world.randint(1, 3)
                    num_running += count
                    feed(Posted(count))
                case Judge() if state.phase is LoadPhase.LOADING:
                    verdicts: list[LoadEvent] = [
                        LedgerGood(),
                        LedgerNotFilled(),
                        LedgerWrongDigest(),
                        Abort("lease_expired", ""),
                    ]
                    feed(world.choice(verdicts))
            continue
        choice = world.random()
        if not shaken and (choice < 0.3 or is_ending):
            shaken = True
            feed(PeerConnected())
        elif num_running and (choice < 0.7 or is_ending):
            if world.random() < 0.1:
                feed(Abort("transfer_failed", ""))
            num_running -= 1
            feed(ReadDone())
        elif choice < 0.75:
            feed(CANCEL)
        else:
            feed(Tick())
    assert len(outcomes) == 1
    assert not is_reserved
    assert num_running == 0
    assert state.phase in (LoadPhase.VERIFIED, LoadPhase.FREE)
