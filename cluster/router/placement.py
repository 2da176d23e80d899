"""Which worker gets a request. Pure: numbers in, a choice out.

cost(worker)     = sequences it has to serve, as far as this router and the worker's last gauge know
preferred worker = highest-ranked by a hash of (affinity, worker): the same prompt prefix or session
                   lands on the same prefix cache, and a worker that leaves moves only its own share
load guard       = the preferred worker is taken only while its cost is within SLACK of the cheapest
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from cluster.types import WorkerLoad

AFFINITY_TOKENS = 256  # prefixes longer than this are told apart by the workers' own caches
MIN_AFFINITY_TOKENS = 16  # a shorter prompt has no whole block to find again
SLACK_SEQUENCES = 4  # how much longer a queue may be for the sake of a warm cache ...
SLACK_RATIO = 1.5  # ... or this many times the shortest one, if that is more


@dataclass(frozen=True, slots=True)
class Candidate:
    """One ready worker. `num_in_flight` counts what this router has there, `load` what the worker says."""

    address: str
    engine_id: str
    num_in_flight: int
    load: WorkerLoad | None = None

    @property
    def cost(self) -> int:
        """The gauge lags and our own count is blind to other routers: the larger one is nearer the truth."""
        reported = 0 if self.load is None else self.load.num_running + self.load.num_waiting
        return max(self.num_in_flight, reported)

    @property
    def used_share(self) -> float:
        if self.load is None or self.load.num_blocks == 0:
            return 0.0
        return 1.0 - self.load.num_free_blocks / self.load.num_blocks


@dataclass(frozen=True, slots=True)
class Pair:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: Candidate | None
    decode: Candidate


def affinity_of(token_ids: Sequence[int], session: str = "") -> bytes:
    """A key that requests with the same session, else the same first tokens, share; empty for none."""
    if session:
        return session.encode()
    if len(token_ids) < MIN_AFFINITY_TOKENS:
        return b""
    return array("q", token_ids[:AFFINITY_TOKENS]).tobytes()


def choose_pair(
    prefill: Sequence[Candidate] | None,
    decode: Sequence[Candidate],
    *,
    affinity: bytes = b"",
    avoid: Collection[str] = (),
    mismatched: Collection[tuple[str, str]] = (),
) -> Pair | None:
    """The pair to use, or None when there is none.

    `prefill` None: no prefill pool is configured; an empty one means that nothing can be placed.
    `avoid`: engine ids to use only if there is no other. `mismatched`: (prefill, decode) engine ids
    that have refused each other.
    """
    if prefill is None:
        chosen = choose(decode, affinity=affinity, avoid=avoid)
        return None if chosen is None else Pair(None, chosen)
    remaining = list(prefill)
    while remaining:
        first = choose(remaining, affinity=affinity, avoid=avoid)
        assert first is not None
        partners = [candidate for candidate in decode if (first.engine_id, candidate.engine_id) not in mismatched]
        second = choose(partners, affinity=affinity, avoid=avoid)
        if second is not None:
            return Pair(first, second)
        remaining.remove(first)
    return None


def choose(candidates: Iterable[Candidate], *, affinity: bytes = b"", avoid: Collection[str] = ()) -> Candidate | None:
    usable = list(candidates)
    preferred_by_history = [candidate for candidate in usable if candidate.engine_id not in avoid]
    usable = preferred_by_history or usable
    if not usable:
        return None
    cheapest = min(usable, key=lambda candidate: (candidate.cost, candidate.used_share, candidate.address))
    if not affinity or len(usable) == 1:
        return cheapest
    warm = max(usable, key=lambda candidate: _rank(affinity, candidate.address))
    allowed = max(cheapest.cost + SLACK_SEQUENCES, cheapest.cost * SLACK_RATIO)
    return warm if warm.cost <= allowed else cheapest


def _rank(affinity: bytes, address: str) -> bytes:
    return hashlib.blake2b(affinity, digest_size=8, key=address.encode()[:64]).digest()
