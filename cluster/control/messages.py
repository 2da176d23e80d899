"""What the event loop and the engine thread of a worker tell each other. Frozen; no locks needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.rpc.base import Inspection
from cluster.types import PrefillResult, PrefillStarted, Request, TokenChunk, WorkerLoad

if TYPE_CHECKING:
    from kvconnector.base import PeerDescription
    from kvconnector.core.handshake import FieldMismatch
    from kvconnector.mapping import Shard

WorkerEvent = PrefillStarted | PrefillResult | TokenChunk


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request
    kv: bytes | None


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    attempt: int
    is_served: bool = False  # all that was wanted has come


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody will read this request's blocks."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Inspect:
    number: int  # names the answer
    token_ids: tuple[int, ...]
    cache_salt: bytes


@dataclass(frozen=True, slots=True)
class PeerQuestion:
    """Engine thread -> event loop: shake hands with this peer."""

    engine_id: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """Event loop -> engine thread. Compatible if `shards`, refused if `mismatches`, else failed."""

    engine_id: str
    shards: tuple[tuple[Shard, PeerDescription], ...] = ()
    mismatches: tuple[FieldMismatch, ...] = ()
    failure: str = ""


Command = Submit | Cancel | Release | Inspect | PeerAnswer


@dataclass(frozen=True, slots=True)
class News:
    """What one turn of the engine thread brought."""

    events: tuple[WorkerEvent, ...]
    load: WorkerLoad
    num_held: int  # leases and loads: what must be over before the process may end
    inspections: tuple[tuple[int, Inspection], ...] = ()
    questions: tuple[PeerQuestion, ...] = ()
