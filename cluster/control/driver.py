"""What both roles do on the engine thread. `prefill/worker.py` and `decode/worker.py` say what differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array

import msgspec

from cluster.control.messages import (
    Cancel,
    Command,
    Inspect,
    News,
    PeerAnswer,
    PeerQuestion,
    Release,
    Submit,
    WorkerEvent,
)
from cluster.engine.block_hash import BlockHashChain
from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent
from cluster.errors import TandemError
from cluster.rpc.base import Inspection
from cluster.types import FinishReason, HistogramReading, Request, RequestError, TokenChunk, WorkerLoad
from kvconnector.digest import KVDigester

IDLE_S = 0.5
HISTOGRAM_PAUSE_S = 0.5  # between two readings: a frame per step must not carry them
COMPUTING_S = 0.0002  # a GPU runs a step and has the next one queued: commands and transfers are looked after
BLOCKED_S = 0.005  # everything waits for blocks, which a lease or a load may free at any time


class TransferCounters(msgspec.Struct):
    """The part of WorkerLoad that the engine does not know."""

    kv_bytes_pulled: int = 0
    kv_transfers: int = 0
    kv_transfer_failures: int = 0
    kv_leases_expired: int = 0
    handshake_refusals: int = 0
    kv_leases_granted: int = 0
    kv_loads_failed: int = 0
    kv_failed_notifications: int = 0
    stale_reads_rejected: int = 0
    digests_rejected: int = 0
    external_cache_queries: int = 0
    external_cache_hits: int = 0


class WorkerDriver(ABC):
    """A `Driver` (cluster/engine/loop.py) over one engine. Engine thread only."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.digester = KVDigester(engine.kv_cache.kv_NL2HSD, engine.layout)
        self.counters = TransferCounters()
        self._events: list[WorkerEvent] = []
        self._inspections: list[tuple[int, Inspection]] = []
        self._questions: list[PeerQuestion] = []
        self._told: WorkerLoad | None = None
        self._told_held = 0
        self._histograms: tuple[HistogramReading, ...] = ()
        self._next_histograms = 0.0

    # ---- what a role adds

    @abstractmethod
    def accept(self, request: Request, kv: bytes | None, now: float) -> None:
        """Raises an error of our tree if the request cannot be taken; nothing is held then."""

    @abstractmethod
    def cancel(self, request_id: str, attempt: int, now: float, *, is_served: bool) -> None: ...

    @abstractmethod
    def release(self, request_id: str, attempt: int, now: float) -> None: ...

    @abstractmethod
    def on_answer(self, answer: PeerAnswer, now: float) -> None: ...

    @abstractmethod
    def poll(self, now: float) -> None:
        """Transfers, leases, notifications."""

    @abstractmethod
    def on_engine_event(self, event: EngineEvent, now: float) -> None: ...

    @abstractmethod
    def poll_pause_s(self) -> float:
        """How long `poll` may wait when the engine has nothing to do."""

    @property
    @abstractmethod
    def num_held(self) -> int:
        """Leases or loads that are not over."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait outside of the engine."""
        return 0

    def histograms(self) -> tuple[HistogramReading, ...]:
        """What is measured in this worker, as it stands."""
        return self.engine.timings.readings()

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def refusal(self, chunk: TokenChunk) -> WorkerEvent:
        """The role's terminal event that carries an error chunk."""

    # ---- the engine thread

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Submit(request, kv):
                try:
                    self.accept(request, kv, now)
                except TandemError as error:
                    self.fail(request, error)
            case Cancel(request_id, attempt, is_served):
                self.cancel(request_id, attempt, now, is_served=is_served)
            case Release(request_id, attempt):
                self.release(request_id, attempt, now)
            case Inspect(number, token_ids, cache_salt):
                self._inspections.append((number, self._inspect(token_ids, cache_salt)))
            case PeerAnswer():
                self.on_answer(command, now)

    def turn(self, now: float) -> News | None:
        self.poll(now)
        if self.engine.has_work():
            for event in self.engine.step(wait=False):
                self.on_engine_event(event, now)
        return self._collect_news(now)

    def idle_s(self, now: float) -> float:
        if self._events or self._inspections or self._questions:
            return 0.0
        if self.engine.has_work():
            if self.engine.is_computing:
                return COMPUTING_S
            return BLOCKED_S if self.engine.is_blocked else 0.0
        return min(IDLE_S, self.poll_pause_s())

    # ---- for the roles

    def emit(self, event: WorkerEvent) -> None:
        self._events.append(event)

    def ask(self, question: PeerQuestion) -> None:
        self._questions.append(question)

    def fail(self, request: Request, error: TandemError) -> None:
        self.end(request, FinishReason.ERROR, RequestError(code=error.code, message=error.message))

    def end(self, request: Request, reason: FinishReason, error: RequestError | None = None) -> None:
        """The terminal event of a request that the engine does not have."""
        chunk = TokenChunk(
            request_id=request.request_id,
            attempt=request.attempt,
            index=len(request.token_ids) - request.prompt_length,
            token_ids=(),
            finish_reason=reason,
            error=error,
        )
        self.emit(self.refusal(chunk))

    # ---- inside

    def _collect_news(self, now: float) -> News | None:
        if now >= self._next_histograms:
            self._next_histograms = now + HISTOGRAM_PAUSE_S
            readings = self.histograms()
            if readings != self._histograms:
                self._histograms = readings
        load = self.engine.load()
        load = msgspec.structs.replace(
            load,
            num_waiting=load.num_waiting + self.num_waiting,
            histograms=self._histograms,
            **msgspec.structs.asdict(self.counters),
        )
        is_news = self._events or self._inspections or self._questions
        if not is_news and load == self._told and self.num_held == self._told_held:
            return None
        self._told, self._told_held = load, self.num_held
        news = News(tuple(self._events), load, self.num_held, tuple(self._inspections), tuple(self._questions))
        self._events.clear()
        self._inspections.clear()
        self._questions.clear()
        return news

    def _inspect(self, token_ids: tuple[int, ...], cache_salt: bytes) -> Inspection:
        blocks = self.engine.blocks
        digests, num_tokens = self._digests_of_cached(token_ids, cache_salt)
        try:
            blocks.check_integrity()
            integrity_error = ""
        except AssertionError as broken:
            integrity_error = str(broken) or "check_integrity() failed"
        load = self.engine.load()
        return Inspection(
            num_blocks=blocks.num_blocks,
            num_free=blocks.num_free,
            num_owned=blocks.num_owned + blocks.num_loading,
            num_leased=blocks.num_pinned,
            num_draining=blocks.num_draining,
            num_requests=load.num_running + load.num_waiting + self.num_waiting,
            num_leases=self.num_held,
            integrity_error=integrity_error,
            num_digest_tokens=num_tokens,
            kv_digests=digests,
        )

    def _digests_of_cached(self, token_ids: tuple[int, ...], cache_salt: bytes) -> tuple[tuple[int, ...], int]:
        """Digests per KV head of the whole blocks of a prompt that the prefix cache still has."""
        blocks = self.engine.blocks
        if not token_ids or not all(0 <= token_id < self.engine.vocab_size for token_id in token_ids):
            return (), 0
        chain = BlockHashChain(array("i", token_ids), blocks.block_size, cache_salt)
        num_tokens = blocks.num_cached_tokens(chain, len(token_ids))
        table = blocks.allocate(chain, num_tokens, num_tokens) if num_tokens else None
        if table is None:
            return (), 0
        try:
            digests = self.digester.tokens(table.block_ids, 0, num_tokens)
        finally:
            blocks.free(table)
        return tuple(int(digest) for digest in digests), num_tokens
