"""A decode worker's engine thread: pulls KV, generates, and computes prompts itself where there is none.

submit with a handle --> admission --> loaded --> engine --> TokenChunk ...
                              \\-- failed: recompute (same bits) or a typed error
submit without ------------------------------------> engine
"""

from __future__ import annotations

import time
from typing import Literal

from cluster.control.driver import WorkerDriver
from cluster.control.messages import PeerAnswer, WorkerEvent
from cluster.control.worker_config import WorkerConfig
from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent
from cluster.engine.scheduler import Policy
from cluster.errors import Cancelled, DigestMismatch, LeaseExpired, TransferFailed
from cluster.types import FinishReason, HistogramReading, Request, RequestError, Role, TokenChunk
from decode.admission import Admission
from decode.policy import DecodePolicy
from kvconnector.base import Transport

READING_PAUSE_S = 0.0005  # READs are under way: their end is seen by polling
LOADING_PAUSE_S = 0.005  # loads wait for blocks, for a peer or for a prompt
CLOSE_POLLS = 200
_RECOMPUTABLE = frozenset({TransferFailed.code, LeaseExpired.code, DigestMismatch.code})


class DecodeDriver(WorkerDriver):
    """Owns the transport and the loads."""

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        *,
        cluster_key: bytes,
        load_timeout_s: float,
        on_failure: Literal["recompute", "fail"],
    ) -> None:
        super().__init__(engine)
        self._transport = transport
        self._recomputes = on_failure == "recompute"
        self._admission = Admission(
            engine,
            transport,
            self.digester,
            cluster_key=cluster_key,
            load_timeout_s=load_timeout_s,
            ask=self.ask,
            on_failed=self._on_load_failed,
        )

    @property
    def num_held(self) -> int:
        return self._admission.num_loads

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    def accept(self, request: Request, kv: bytes | None, now: float) -> None:
        if kv is None:
            self.engine.add_request(request)
        else:
            self._admission.begin(request, kv, now)

    def cancel(self, request_id: str, attempt: int, now: float, *, is_served: bool) -> None:
        if not self._admission.cancel((request_id, attempt), now):
            self.engine.cancel(request_id, attempt, is_served=is_served)

    def release(self, request_id: str, attempt: int, now: float) -> None:
        """A decode worker lends nothing."""

    def on_answer(self, answer: PeerAnswer, now: float) -> None:
        self._admission.on_answer(answer, now)

    def poll(self, now: float) -> None:
        self._admission.poll(now)
        counters, measures = self.counters, self._admission.measures
        counters.handshake_refusals = self._admission.num_refusals
        counters.kv_transfers = measures.num_transfers
        counters.kv_bytes_pulled = measures.num_bytes
        counters.kv_transfer_failures = measures.num_failed_transfers
        counters.kv_loads_failed = measures.num_failed_loads
        counters.kv_failed_notifications = measures.num_failed_notifications
        counters.stale_reads_rejected = measures.num_stale_reads
        counters.digests_rejected = measures.num_wrong_digests
        counters.external_cache_queries = measures.num_external_queries
        counters.external_cache_hits = measures.num_external_hits

    def histograms(self) -> tuple[HistogramReading, ...]:
        return (*super().histograms(), *self._admission.measures.readings())

    def poll_pause_s(self) -> float:
        if self._admission.is_reading:
            return READING_PAUSE_S
        return LOADING_PAUSE_S if self._admission.num_loads else 1.0

    def on_engine_event(self, event: EngineEvent, now: float) -> None:
        assert isinstance(event, TokenChunk), "a decode engine hands nothing over"
        self.emit(event)

    def refusal(self, chunk: TokenChunk) -> WorkerEvent:
        return chunk

    def close(self) -> None:
        """Wait a bounded time for READs that may still land; after that the process must end, which
        ends them too."""
        for _ in range(CLOSE_POLLS):
            if self._admission.close(time.monotonic()):
                self._transport.close()
                return
            self._admission.poll(time.monotonic())
            time.sleep(READING_PAUSE_S * 10)

    def _on_load_failed(self, request: Request, code: str, message: str) -> None:
        if code == Cancelled.code:
            self.end(request, FinishReason.CANCELLED)
        elif self._recomputes and code in _RECOMPUTABLE:
            self.engine.add_request(request)
        else:
            self.end(request, FinishReason.ERROR, RequestError(code=code, message=message))


class DecodeParts:
    """A `RoleParts` (cluster/control/process.py)."""

    role = Role.DECODE

    def make_policy(self) -> Policy:
        return DecodePolicy()

    def make_driver(
        self, engine: Engine, transport: Transport, config: WorkerConfig, cluster_key: bytes, engine_id: str
    ) -> WorkerDriver:
        return DecodeDriver(
            engine,
            transport,
            cluster_key=cluster_key,
            load_timeout_s=config.load_timeout_s,
            on_failure=config.on_failure,
        )

    def set_endpoint(self, driver: WorkerDriver, endpoint: str) -> None:
        """Nobody pulls from a decode worker."""
