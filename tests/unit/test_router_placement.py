"""Placement and recovery are pure: every rule is a case."""

from __future__ import annotations

import msgspec
import pytest

from cluster.errors import (
    ContextTooLong,
    DigestMismatch,
    HandshakeMismatch,
    InvalidRequest,
    LeaseExpired,
    NumericalError,
    Overloaded,
    TandemError,
    TransferFailed,
    WorkerLost,
)
from cluster.router.placement import SLACK_SEQUENCES, Candidate, affinity_of, choose, choose_pair
from cluster.router.recovery import Recovery, from_wire, kind_of, recovery_for
from cluster.types import RequestError, WorkerLoad


def worker(name: str, num_in_flight: int = 0, **load: int) -> Candidate:
    reported = None
    if load:
        counts = {"num_running": 0, "num_waiting": 0, "num_free_blocks": 10, "num_blocks": 10, **load}
        reported = msgspec.convert(counts, WorkerLoad)
    return Candidate(address=name, engine_id=f"{name}#1", num_in_flight=num_in_flight, load=reported)


def test_least_loaded_wins_by_the_larger_of_gauge_and_own_count() -> None:
    assert choose([worker("a", 3), worker("b", 2)]) == worker("b", 2)
    busy = worker("b", 0, num_running=2, num_waiting=2)
    assert choose([worker("a", 3), busy]) == worker("a", 3)
    assert choose([]) is None


def test_among_equals_the_one_with_more_free_blocks_wins() -> None:
    full, empty = worker("a", num_free_blocks=1), worker("b", num_free_blocks=9)
    assert choose([full, empty]) == empty


def test_same_prefix_goes_to_the_same_worker_until_that_is_overloaded() -> None:
    names = [f"w{index}" for index in range(8)]
    affinity = affinity_of(range(100))
    preferred = choose([worker(name) for name in names], affinity=affinity)
    assert preferred is not None
    within = [worker(name, SLACK_SEQUENCES if name == preferred.address else 0) for name in names]
    beyond = [worker(name, SLACK_SEQUENCES + 1 if name == preferred.address else 0) for name in names]
    chosen_within, chosen_beyond = choose(within, affinity=affinity), choose(beyond, affinity=affinity)
    assert chosen_within is not None
    assert chosen_within.address == preferred.address
    assert chosen_beyond is not None
    assert chosen_beyond.address != preferred.address


def test_affinity_spreads_and_a_leaving_worker_moves_only_its_own_share() -> None:
    workers = [worker(f"w{index}") for index in range(5)]
    keys = [affinity_of([key] * 32) for key in range(200)]
    before = [choose(workers, affinity=key) for key in keys]
    after = [choose(workers[:-1], affinity=key) for key in keys]
    assert {candidate.address for candidate in before if candidate} == {f"w{index}" for index in range(5)}
    assert all(old == new for old, new in zip(before, after, strict=True) if old != workers[-1])


def test_affinity_is_the_session_else_the_first_tokens() -> None:
    assert affinity_of([1, 2, 3]) == b""
    assert affinity_of(range(1000)) == affinity_of(range(500))
    assert affinity_of(range(100), "s") == affinity_of([1], "s") != affinity_of(range(100))


def test_a_worker_that_failed_is_used_only_when_there_is_no_other() -> None:
    a, b = worker("a"), worker("b", 9)
    assert choose([a, b], avoid={"a#1"}) == b
    assert choose([a], avoid={"a#1"}) == a


def test_pairs() -> None:
    p0, p1, d0, d1 = worker("p0"), worker("p1"), worker("d0"), worker("d1")
    assert choose_pair(None, [d0]) is not None
    assert choose_pair([], [d0]) is None, "a prefill pool without workers must not silently degrade"
    assert choose_pair([p0], []) is None
    pair = choose_pair([p0, p1], [d0, d1], mismatched={("p0#1", "d0#1"), ("p0#1", "d1#1"), ("p1#1", "d0#1")})
    assert pair is not None
    assert (pair.prefill, pair.decode) == (p1, d1)
    assert choose_pair([p0], [d0], mismatched={("p0#1", "d0#1")}) is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (WorkerLost, Recovery.ELSEWHERE),
        (Overloaded, Recovery.ELSEWHERE),
        (HandshakeMismatch, Recovery.OTHER_PAIR),
        (TransferFailed, Recovery.RECOMPUTE),
        (LeaseExpired, Recovery.RECOMPUTE),
        (DigestMismatch, Recovery.RECOMPUTE),
        (InvalidRequest, Recovery.FAIL),
        (ContextTooLong, Recovery.FAIL),
        (NumericalError, Recovery.FAIL),
        (TandemError, Recovery.FAIL),
    ],
)
def test_recovery(kind: type[TandemError], expected: Recovery) -> None:
    assert recovery_for(kind, attempts=1, max_attempts=3) is expected
    is_bounded_by_pairs = kind is HandshakeMismatch
    last = recovery_for(kind, attempts=3, max_attempts=3)
    assert last is (Recovery.OTHER_PAIR if is_bounded_by_pairs else Recovery.FAIL)


def test_error_from_the_wire_keeps_its_class() -> None:
    error = from_wire(RequestError(code="handshake_mismatch", message="differ in: model_digest"))
    assert kind_of(error) is HandshakeMismatch
    assert error.message == "differ in: model_digest"
    assert kind_of(from_wire(RequestError(code="of_a_later_version", message=""))) is TandemError
    assert kind_of(WorkerLost("x")) is WorkerLost
