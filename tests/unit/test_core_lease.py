"""One lease, in any order of events: blocks are released exactly once, and never before they are pinned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvconnector.core.lease import (
    CancelCompute,
    Done,
    Ended,
    Finished,
    LeaseEffect,
    LeaseEvent,
    LeasePhase,
    LeaseState,
    Progress,
    ReleaseBlocks,
    Renewed,
    Tick,
    is_over,
    step,
)

LEASE_S = 10.0


def play(*timed: tuple[float, LeaseEvent]) -> tuple[LeaseState, list[LeaseEffect]]:
    state = LeaseState(LEASE_S)
    effects: list[LeaseEffect] = []
    for now, event in timed:
        state, done = step(state, event, now)
        effects += done
    return state, effects


def test_done_releases() -> None:
    state, effects = play((0, Progress()), (1, Finished()), (2, Done()), (3, Done()))
    assert state.phase is LeasePhase.RELEASED
    assert effects == [ReleaseBlocks(expired=False)]


def test_silence_expires_and_renewal_prolongs() -> None:
    state, effects = play((0, Progress()), (1, Finished()), (9, Renewed()), (18.9, Tick()))
    assert state.phase is LeasePhase.LEASED
    state, expiry = step(state, Tick(), 19.0)
    assert state.phase is LeasePhase.EXPIRED
    assert (*effects, *expiry) == (ReleaseBlocks(expired=True),)
    assert step(state, Renewed(), 19.1) == (state, ())  # too late


def test_the_lease_begins_when_the_prompt_is_finished() -> None:
    state, effects = play((0, Progress()), (500, Tick()), (501, Progress()))
    assert state.phase is LeasePhase.FILLING
    assert effects == []


def test_nobody_will_read_what_is_being_computed() -> None:
    state, effects = play((0, Progress()), (1, Done()), (2, Done()), (3, Ended()))
    assert effects == [CancelCompute()]
    assert is_over(state)
    state, effects = play((0, Progress()), (1, Done()), (2, Finished()))  # the result was faster
    assert effects == [CancelCompute(), ReleaseBlocks(expired=False)]
    assert is_over(state)


events: st.SearchStrategy[LeaseEvent] = st.sampled_from([Progress(), Renewed(), Done(), Tick()])


@given(st.lists(st.tuples(st.floats(0, 20), events)), st.lists(st.tuples(st.floats(0, 20), events)), st.booleans())
def test_any_history_releases_once(
    before: list[tuple[float, LeaseEvent]], after: list[tuple[float, LeaseEvent]], finishes: bool
) -> None:
    state, now = LeaseState(LEASE_S), 0.0
    effects: list[LeaseEffect] = []
    end: LeaseEvent = Finished() if finishes else Ended()
    for delay, event in (*before, (0.0, end), *after):
        now += delay
        state, done = step(state, event, now)
        effects += done
        if event is end and not finishes:
            assert is_over(state)
    state, done = step(state, Tick(), now + LEASE_S + 1)
    effects += done
    assert is_over(state)
    releases = [effect for effect in effects if isinstance(effect, ReleaseBlocks)]
    assert len(releases) == (1 if finishes else 0)
