"""One lease on a prefill worker: how long the blocks of a prompt stay readable, and what ends it.

    ALLOCATED -- rows stored --> FILLING -- finished --> LEASED -- done, dropped --> RELEASED \\
        \\----- cancelled, failed -----/                     \\---- no renewal ------> EXPIRED   } FREE
                     |                                                                        /
                 RELEASED (the engine frees what it still owns) -----------------------------/

While a prompt is computed the engine owns its blocks and the router's session bounds their life, so the
lease only begins to run when the prompt is finished. A reader's renewals may come before that.

Sans-IO: no clock, randomness, threads or sockets; the caller gives `now` and carries out the effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec


class LeasePhase(Enum):
    ALLOCATED = "allocated"
    FILLING = "filling"
    LEASED = "leased"
    RELEASED = "released"
    EXPIRED = "expired"
    FREE = "free"


class LeaseState(msgspec.Struct, frozen=True):
    lease_s: float
    phase: LeasePhase = LeasePhase.ALLOCATED
    expires: float = 0.0  # LEASED: without a renewal
    is_dropped: bool = False  # nobody will read it: free it as soon as it is finished


@dataclass(frozen=True, slots=True)
class Progress:
    """More rows are stored and recorded in the ledger."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The prompt is computed; the blocks are pinned for the reader from here on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The request ended without a lease: cancelled, failed, or complete with its first token."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """A sign of life from the reader."""


@dataclass(frozen=True, slots=True)
class Done:
    """The reader has what it needs, or the router says that nobody will read. Idempotent."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


LeaseEvent = Progress | Finished | Ended | Renewed | Done | Tick


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """Unpin; a late reader will find a new generation once they are used again."""

    expired: bool


@dataclass(frozen=True, slots=True)
class CancelCompute:
    """Nobody will read the prompt that is being computed."""


LeaseEffect = ReleaseBlocks | CancelCompute


def step(state: LeaseState, event: LeaseEvent, now: float) -> tuple[LeaseState, tuple[LeaseEffect, ...]]:
    match state.phase, event:
        case LeasePhase.ALLOCATED, Progress():
            return msgspec.structs.replace(state, phase=LeasePhase.FILLING), ()
        case ((LeasePhase.ALLOCATED | LeasePhase.FILLING), Finished()) if state.is_dropped:
            return _free(state), (ReleaseBlocks(expired=False),)
        case ((LeasePhase.ALLOCATED | LeasePhase.FILLING), Finished()):
            return msgspec.structs.replace(state, phase=LeasePhase.LEASED, expires=now + state.lease_s), ()
        case ((LeasePhase.ALLOCATED | LeasePhase.FILLING), Ended()):
            return _free(state), ()
        case ((LeasePhase.ALLOCATED | LeasePhase.FILLING), Done()) if not state.is_dropped:
            return msgspec.structs.replace(state, is_dropped=True), (CancelCompute(),)
        case LeasePhase.LEASED, Renewed():
            return msgspec.structs.replace(state, expires=now + state.lease_s), ()
        case LeasePhase.LEASED, Done():
            return _free(state, LeasePhase.RELEASED), (ReleaseBlocks(expired=False),)
        case LeasePhase.LEASED, Tick() if now >= state.expires:
            return _free(state, LeasePhase.EXPIRED), (ReleaseBlocks(expired=True),)
    return state, ()


def _free(state: LeaseState, phase: LeasePhase = LeasePhase.FREE) -> LeaseState:
    """RELEASED and EXPIRED are FREE as soon as their effect is carried out; the name is kept for logs."""
    return msgspec.structs.replace(state, phase=phase)


def is_over(state: LeaseState) -> bool:
    return state.phase in (LeasePhase.RELEASED, LeasePhase.EXPIRED, LeasePhase.FREE)
