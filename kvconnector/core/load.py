"""One load on a decode worker: from a sealed handle to verified blocks, or to nothing held.

    SHAKING -- peer connected --> WAITING -- reserved --> RESERVED -- READ posted --> LOADING
                                                                                        |  all landed
       any abort, READs running --> DRAINING -- last one landed --> FREE                v
       any abort, none running  --> FREE                          ledger read, generations and digest
                                                                   GOOD --> VERIFIED --> (RUNNING, DONE:
                                                                            the engine's from here on)

Order within LOADING: data first, then the ledger, as in a seqlock. Blocks that were not filled yet are
read again after a pause, so a load may begin while its prompt is still computed. A wrong digest is a
reason to read all again before it is believed: the block may have been filled between our READ of it
and that of its record, or the owner may have been between two writes of the record.

Whatever happens, exactly one of `Commit` and `Fail` comes out, and the reservation is given back only
when no READ can still write it. Every phase is bounded by `deadline`, except DRAINING, which the
transport bounds.

Sans-IO: no clock, randomness, threads or sockets; the caller gives `now` and carries out the effects.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

POLL_S = 0.005  # pause before a ledger is read again
MAX_WRONG_DIGESTS = 3


class LoadPhase(Enum):
    SHAKING = "shaking"
    WAITING = "waiting"
    RESERVED = "reserved"
    LOADING = "loading"
    DRAINING = "draining"
    VERIFIED = "verified"
    FREE = "free"


class LoadState(msgspec.Struct, frozen=True):
    lease_s: float
    deadline: float
    phase: LoadPhase = LoadPhase.SHAKING
    num_running: int = 0  # READs that may still write our memory
    reads_ledger: bool = False  # the running READ is the ledger's
    retry_at: float | None = None  # LOADING, nothing running: when to read again
    num_bad_digests: int = 0
    next_renewal: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The source answered the handshake."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Blocks are reserved. `needs_reads` False: the prefix cache had all of them."""

    needs_reads: bool


@dataclass(frozen=True, slots=True)
class Posted:
    """`num_reads` READs were started."""

    num_reads: int


@dataclass(frozen=True, slots=True)
class ReadDone:
    """One READ has landed."""


@dataclass(frozen=True, slots=True)
class LedgerGood:
    """Generations are as promised, everything was filled, digests are equal."""


@dataclass(frozen=True, slots=True)
class LedgerNotFilled:
    """The source has not computed all of it yet."""


@dataclass(frozen=True, slots=True)
class LedgerWrongDigest:
    """Generations are as promised, the content is not what was recorded."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancelled, refused, a READ failed, blocks were reused, an answer failed, ... A READ that failed has not ended by
    that: parts of it may be on their way, and `ReadDone` says when none is."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


LoadEvent = (
    PeerConnected | Reserved | Posted | ReadDone | LedgerGood | LedgerNotFilled | LedgerWrongDigest | Abort | Tick
)


@dataclass(frozen=True, slots=True)
class TryReserve:
    """Answer with `Reserved`, or not at all if blocks lack: it is asked again at the next Tick."""


@dataclass(frozen=True, slots=True)
class ReadData:
    """Post the READs of all blocks that the prefix cache lacks; answer with `Posted`."""


@dataclass(frozen=True, slots=True)
class ReadLedger:
    """Post the READ of the source's records; answer with `Posted`."""


@dataclass(frozen=True, slots=True)
class Judge:
    """The records have landed: compare them; answer with a Ledger event or `Abort`."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Tell the source that its lease is still wanted."""


@dataclass(frozen=True, slots=True)
class TellDone:
    """Tell the source that its blocks are needed no more."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Verified: the blocks are a sequence's."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Nothing can land any more: free the reservation, if there is one."""


@dataclass(frozen=True, slots=True)
class StartDraining:
    """READs may still land: the reservation must be kept."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The load is over without KV; what becomes of the request is the worker's policy."""

    code: str
    message: str


LoadEffect = TryReserve | ReadData | ReadLedger | Judge | Renew | TellDone | Commit | GiveBack | StartDraining | Fail
Step = tuple[LoadState, tuple[LoadEffect, ...]]


def step(state: LoadState, event: LoadEvent, now: float) -> Step:
    if isinstance(event, Abort):
        return _abort(state, event)
    match state.phase, event:
        case LoadPhase.SHAKING, PeerConnected():
            return _with(state, phase=LoadPhase.WAITING), (TryReserve(),)
        case LoadPhase.WAITING, Reserved(needs_reads=False):
            return _with(state, phase=LoadPhase.VERIFIED), (Commit(), TellDone())
        case LoadPhase.WAITING, Reserved():
            return _with(state, phase=LoadPhase.RESERVED), (ReadData(),)
        case ((LoadPhase.RESERVED | LoadPhase.LOADING), Posted(num_reads)):
            return _with(state, phase=LoadPhase.LOADING, num_running=state.num_running + num_reads), ()
        case LoadPhase.LOADING, ReadDone():
            return _landed(state)
        case LoadPhase.LOADING, LedgerGood():
            return _with(state, phase=LoadPhase.VERIFIED), (Commit(), TellDone())
        case LoadPhase.LOADING, LedgerNotFilled():
            return _with(state, retry_at=now + POLL_S, reads_ledger=False), ()
        case LoadPhase.LOADING, LedgerWrongDigest():
            return _wrong_digest(state)
        case LoadPhase.DRAINING, ReadDone():
            return _drained(_with(state, num_running=state.num_running - 1))
        case _, Tick():
            return _tick(state, now)
    return state, ()


def _with(state: LoadState, **changes: object) -> LoadState:
    changed: LoadState = msgspec.structs.replace(state, **changes)
    return changed


def _landed(state: LoadState) -> Step:
    state = _with(state, num_running=state.num_running - 1)
    if state.num_running:
        return state, ()
    if state.reads_ledger:
        return state, (Judge(),)
    return _with(state, reads_ledger=True), (ReadLedger(),)


def _wrong_digest(state: LoadState) -> Step:
    state = _with(state, num_bad_digests=state.num_bad_digests + 1)
    if state.num_bad_digests < MAX_WRONG_DIGESTS:
        return _with(state, reads_ledger=False), (ReadData(),)
    return _abort(state, Abort("digest_mismatch", "what arrived is not what the prefill worker computed"))


def _abort(state: LoadState, event: Abort) -> Step:
    """The request is told at once; the blocks are given back when nothing can land in them any more. The
    source's are released in any case, because nobody else will read them (vllm#41269)."""
    if state.phase in (LoadPhase.VERIFIED, LoadPhase.FREE):
        return state, ()
    if state.phase is LoadPhase.DRAINING:  # the first failure has been told
        return state, ()
    fail = Fail(event.code, event.message)
    if state.num_running:
        return _with(state, phase=LoadPhase.DRAINING), (StartDraining(), fail)
    state, effects = _drained(state)
    return state, (*effects, fail)


def _drained(state: LoadState) -> Step:
    if state.num_running:
        return state, ()
    return _with(state, phase=LoadPhase.FREE), (GiveBack(), TellDone())


def _tick(state: LoadState, now: float) -> Step:
    if state.phase in (LoadPhase.VERIFIED, LoadPhase.FREE, LoadPhase.DRAINING):
        return state, ()
    if now >= state.deadline:
        return _abort(state, Abort("transfer_failed", f"the hand-over took too long ({state.phase.value})"))
    effects: list[LoadEffect] = []
    if now >= state.next_renewal and state.phase is not LoadPhase.SHAKING:
        state = _with(state, next_renewal=now + state.lease_s / 4)
        effects.append(Renew())
    if state.phase is LoadPhase.WAITING:
        effects.append(TryReserve())
    if state.retry_at is not None and now >= state.retry_at:
        state = _with(state, retry_at=None)
        effects.append(ReadData())
    return state, tuple(effects)
