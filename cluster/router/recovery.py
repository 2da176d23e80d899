"""What to do when an attempt has failed. Pure, so that every case is a line in a test.

The numerics contract makes a continuation exact: prompt plus emitted tokens, computed anywhere, go on
with the bits of the undisturbed run. So a lost worker costs time, not the stream.
"""

from __future__ import annotations

from enum import Enum

from cluster.errors import (
    HandoverError,
    HandshakeMismatch,
    Overloaded,
    TandemError,
    WorkerLost,
    error_class_of,
)
from cluster.types import RequestError


class Recovery(Enum):
    FAIL = "fail"  # the error is the request's own, or retries are used up
    ELSEWHERE = "elsewhere"  # place again, rather not on the worker that failed
    OTHER_PAIR = "other_pair"  # these two workers never again; each may serve with another partner
    RECOMPUTE = "recompute"  # the KV did not arrive: compute it again, anywhere


class WorkerError(TandemError):
    """A typed failure that came over the wire; `kind` is its class in errors.py."""

    def __init__(self, kind: type[TandemError], message: str) -> None:
        super().__init__(message)
        self.kind = kind


def from_wire(error: RequestError) -> WorkerError:
    return WorkerError(error_class_of(error.code), error.message)


def kind_of(error: TandemError) -> type[TandemError]:
    return error.kind if isinstance(error, WorkerError) else type(error)


def recovery_for(kind: type[TandemError], *, attempts: int, max_attempts: int) -> Recovery:
    """`attempts` counts those made so far, the failed one included; pairs that did not fit count for nothing."""
    if issubclass(kind, HandshakeMismatch):
        return Recovery.OTHER_PAIR
    if attempts >= max_attempts:
        return Recovery.FAIL
    if issubclass(kind, HandoverError):
        return Recovery.RECOMPUTE
    if issubclass(kind, WorkerLost | Overloaded):
        return Recovery.ELSEWHERE
    return Recovery.FAIL
