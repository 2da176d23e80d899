"""How much a router takes on. What is over the limit is refused at once, so nothing piles up here:
the workers have queues, the router has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import InvalidRequest, Overloaded


class Admission:
    """Counts sequences in flight and bodies being read. One event loop, no locks."""

    def __init__(self, *, max_sequences: int, max_sequences_per_request: int) -> None:
        self._max_sequences = max_sequences
        self._max_per_request = min(max_sequences, max_sequences_per_request)
        self._num_reading = 0
        self.num_sequences = 0
        self.is_draining = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Held while a body is read: bounds the memory of bodies to max_sequences * max_body_bytes."""
        self._refuse_when_draining()
        if self._num_reading >= self._max_sequences:
            raise Overloaded(f"{self._num_reading} requests are being received, which is the limit")
        self._num_reading += 1
        try:
            yield
        finally:
            self._num_reading -= 1

    @contextmanager
    def running(self, num_sequences: int, param: str = "n") -> Iterator[None]:
        """Held from acceptance to the terminal event. Raises `Overloaded`, or `InvalidRequest` for what
        could never be admitted; `param` is the field that made them so many."""
        self._refuse_when_draining()
        if num_sequences > self._max_per_request:
            raise InvalidRequest(
                f"prompts times n make {num_sequences} sequences, at most {self._max_per_request} are allowed "
                "in one request",
                param=param,
            )
        if self.num_sequences + num_sequences > self._max_sequences:
            raise Overloaded(
                f"{self.num_sequences} of {self._max_sequences} sequences are in flight, "
                f"no room for {num_sequences} more"
            )
        self.num_sequences += num_sequences
        try:
            yield
        finally:
            self.num_sequences -= num_sequences

    def _refuse_when_draining(self) -> None:
        if self.is_draining:
            raise Overloaded("this router is shutting down", retry_after_s=5.0)
