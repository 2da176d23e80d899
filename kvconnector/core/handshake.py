"""Who may be paired: the comparison of two KV identities, and a decode worker's view of one peer.

    UNKNOWN -- wanted --> SHAKING -- answered --> CONNECTED
       ^                     |   \\-- refused --> REFUSED     for this engine_id, for `refusal_s`
       +-- failed, timeout --+                                a failure is not remembered: the next load
       +-- transport failed (from CONNECTED)                  tries again (sglang#13054)

Sans-IO: no clock, randomness, threads or sockets; the caller gives `now` and carries out the effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import msgspec

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


class KVIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that must be equal for KV to mean the same on both sides. Degrees of parallelism and
    block sizes are not in here: they are mapped (`kvconnector/mapping.py`), not compared."""

    config_digest: str
    weights_digest: str
    kv_dtype: str
    attention_kind: str  # "mha", "gqa" or "mla"
    num_layers: int  # of the whole model
    num_kv_heads: int  # likewise
    head_size: int
    rope: str  # a canonical rendering of its parameters
    kv_layout: str  # order of the axes in memory
    numeric_fingerprint: str
    transports: tuple[str, ...]
    invariant: bool = True
    revision: str = ""
    quantisation: str = ""
    adapters: tuple[str, ...] = ()
    weight_version: str = ""
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


class FieldMismatch(NamedTuple):
    field: str
    ours: str
    theirs: str


_EQUAL_FIELDS = (
    "config_digest",
    "weights_digest",
    "revision",
    "quantisation",
    "adapters",
    "weight_version",
    "kv_dtype",
    "attention_kind",
    "num_layers",
    "num_kv_heads",
    "head_size",
    "rope",
    "kv_layout",
    "invariant",
)


def compare(ours: KVIdentity, theirs: KVIdentity) -> tuple[FieldMismatch, ...]:
    """Every field that forbids a pairing, with both values; empty if the two are compatible."""
    found = [
        FieldMismatch(name, _text(getattr(ours, name)), _text(getattr(theirs, name)))
        for name in _EQUAL_FIELDS
        if getattr(ours, name) != getattr(theirs, name)
    ]
    # An empty digest is "unknown", and two unknowns are not known to be equal.
    found += [
        FieldMismatch(name, "unknown", "unknown")
        for name in ("config_digest", "weights_digest")
        if getattr(ours, name) == getattr(theirs, name) == ""
    ]
    if (ours.invariant or theirs.invariant) and (
        ours.numeric_fingerprint != theirs.numeric_fingerprint or not ours.numeric_fingerprint
    ):
        found.append(
            FieldMismatch("numeric_fingerprint", _text(ours.numeric_fingerprint), _text(theirs.numeric_fingerprint))
        )
    if common_version(ours, theirs) is None:
        found.append(FieldMismatch("protocol_version", _versions(ours), _versions(theirs)))
    if not set(ours.transports) & set(theirs.transports):
        found.append(FieldMismatch("transports", _text(ours.transports), _text(theirs.transports)))
    return tuple(found)


def common_version(ours: KVIdentity, theirs: KVIdentity) -> int | None:
    """The highest protocol version both speak."""
    highest = min(ours.protocol_max, theirs.protocol_max)
    return highest if highest >= max(ours.protocol_min, theirs.protocol_min) else None


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return str(value) or "none"


def _versions(identity: KVIdentity) -> str:
    return f"{identity.protocol_min}-{identity.protocol_max}"


class PeerPhase(Enum):
    UNKNOWN = "unknown"
    SHAKING = "shaking"
    CONNECTED = "connected"
    REFUSED = "refused"


class PeerState(msgspec.Struct, frozen=True):
    phase: PeerPhase = PeerPhase.UNKNOWN
    until: float = 0.0  # SHAKING: answered by then; REFUSED: not asked again before
    mismatches: tuple[FieldMismatch, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A load needs this peer."""


@dataclass(frozen=True, slots=True)
class Compatible:
    """It answered, and the transport is connected."""


@dataclass(frozen=True, slots=True)
class Refused:
    mismatches: tuple[FieldMismatch, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer, a malformed one, or the transport could not connect."""

    reason: str


@dataclass(frozen=True, slots=True)
class TransportBroke:
    """A READ from the peer failed: what was known of its memory is void."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


PeerEvent = Wanted | Compatible | Refused | Failed | TransportBroke | Tick


@dataclass(frozen=True, slots=True)
class Ask:
    """Send the handshake."""


@dataclass(frozen=True, slots=True)
class TellConnected:
    """All loads that wait for this peer may go on."""


@dataclass(frozen=True, slots=True)
class TellRefused:
    mismatches: tuple[FieldMismatch, ...]


@dataclass(frozen=True, slots=True)
class TellFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Forget the peer's memory."""


PeerEffect = Ask | TellConnected | TellRefused | TellFailed | Disconnect


def step(
    state: PeerState, event: PeerEvent, now: float, *, timeout_s: float = 5.0, refusal_s: float = 30.0
) -> tuple[PeerState, tuple[PeerEffect, ...]]:
    """An answer that comes after its timeout is ignored."""
    match state.phase, event:
        case PeerPhase.CONNECTED, Wanted():
            return state, (TellConnected(),)
        case PeerPhase.REFUSED, Wanted() if now < state.until:
            return state, (TellRefused(state.mismatches),)
        case ((PeerPhase.UNKNOWN | PeerPhase.REFUSED), Wanted()):
            return PeerState(PeerPhase.SHAKING, now + timeout_s), (Ask(),)
        case PeerPhase.SHAKING, Compatible():
            return PeerState(PeerPhase.CONNECTED), (TellConnected(),)
        case PeerPhase.SHAKING, Refused(mismatches):
            return PeerState(PeerPhase.REFUSED, now + refusal_s, mismatches), (TellRefused(mismatches),)
        case PeerPhase.SHAKING, Failed(reason):
            return PeerState(), (TellFailed(reason),)
        case PeerPhase.SHAKING, Tick() if now >= state.until:
            return PeerState(), (TellFailed(f"no answer to the handshake within {timeout_s:g} s"),)
        case PeerPhase.CONNECTED, TransportBroke():
            return PeerState(), (Disconnect(),)
    return state, ()
