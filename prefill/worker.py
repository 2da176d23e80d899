"""A prefill worker's engine thread: computes prompts and lends their KV.

submit --> engine --> PromptStarted   a handle is sealed and published, a lease begins
                      PromptProgress  the ledger says how far the blocks are filled
                      PromptFinished  first token; the blocks stay pinned until done, release, expiry
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control.driver import WorkerDriver
from cluster.control.messages import PeerAnswer, WorkerEvent
from cluster.control.worker_config import WorkerConfig
from cluster.engine.block_holders import Lease
from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent, PromptFinished, PromptProgress, PromptStarted
from cluster.engine.scheduler import Policy
from cluster.errors import InvalidRequest
from cluster.types import KVHandle, PrefillResult, PrefillStarted, Request, Role, TokenChunk
from kvconnector import notices, ticket
from kvconnector.base import Transport
from kvconnector.core import lease as core
from kvconnector.ledger import Ledger
from prefill.policy import PrefillPolicy

logger = logging.getLogger(__name__)

POLL_S = 0.02  # while leases live: notifications are polled for
EXPIRY_POLL_S = 0.1
DIGEST_POLL_S = 0.0005  # a reader waits for them
_Key = tuple[str, int]


@dataclass(slots=True)
class _Lent:
    """One prompt whose handle has been published."""

    handle: KVHandle
    sealed: bytes
    state: core.LeaseState
    pins: Lease | None = field(default=None)  # from PromptFinished on


class PrefillDriver(WorkerDriver):
    """Owns the transport and the leases. `endpoint` must be set before the first request."""

    endpoint: str

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        *,
        engine_id: str,
        cluster_key: bytes,
        lease_s: float,
        weight_version: str = "",
        make_nonce: Callable[[], bytes] = lambda: secrets.token_bytes(ticket.NONCE_BYTES),
    ) -> None:
        super().__init__(engine)
        self._transport = transport
        self._engine_id = engine_id
        self._cluster_key = cluster_key
        self._lease_s = lease_s
        self._weight_version = weight_version
        self._make_nonce = make_nonce
        self._ledger = Ledger(engine.num_blocks, engine.layout.block_size, engine.layout.num_kv_heads, self.digester)
        engine.blocks.set_allocation_listener(self._ledger.on_allocated)
        transport.register("kv", engine.kv_cache.kv_NL2HSD)
        transport.register("ledger", self._ledger.memory)
        self._lent: dict[_Key, _Lent] = {}
        self._next_expiry_check = 0.0

    @property
    def num_held(self) -> int:
        return len(self._lent)

    def accept(self, request: Request, kv: bytes | None, now: float) -> None:
        if kv is not None:
            raise InvalidRequest("a prefill worker takes no KV handle", param="kv")
        self.engine.add_request(request)

    def cancel(self, request_id: str, attempt: int, now: float, *, is_served: bool) -> None:
        """Also of a request whose result is on its way: nobody will read its blocks."""
        self.engine.cancel(request_id, attempt, is_served=is_served)
        self._step((request_id, attempt), core.Done(), now)

    def release(self, request_id: str, attempt: int, now: float) -> None:
        self._step((request_id, attempt), core.Done(), now)

    def on_answer(self, answer: PeerAnswer, now: float) -> None:
        raise AssertionError("a prefill worker asks nobody")

    def poll(self, now: float) -> None:
        self._ledger.poll()
        for _, message in self._transport.notifications():
            notice = notices.decode(message)
            if notice is not None:
                self._on_notice(notice, now)
        if now >= self._next_expiry_check:
            self._next_expiry_check = now + EXPIRY_POLL_S
            for key in tuple(self._lent):
                self._step(key, core.Tick(), now)

    def poll_pause_s(self) -> float:
        if self._ledger.is_waiting:
            return DIGEST_POLL_S
        return POLL_S if self._lent else EXPIRY_POLL_S

    def on_engine_event(self, event: EngineEvent, now: float) -> None:
        match event:
            case PromptStarted():
                self._on_started(event)
            case PromptProgress(request_id, attempt, num_tokens):
                lent = self._lent[request_id, attempt]
                self._ledger.advance(lent.handle.block_ids, min(num_tokens, lent.handle.num_tokens))
                self._step((request_id, attempt), core.Progress(), now)
            case PromptFinished():
                self._on_finished(event, now)
            case TokenChunk():
                raise AssertionError("a prefill engine streams no tokens")

    def refusal(self, chunk: TokenChunk) -> WorkerEvent:
        return PrefillResult(first=chunk, kv=None)

    def close(self) -> None:
        for lent in self._lent.values():
            if lent.pins is not None:
                self.engine.release(lent.pins)
        self._lent.clear()
        self._transport.close()

    def _on_started(self, event: PromptStarted) -> None:
        handle = KVHandle(
            engine_id=self._engine_id,
            request_id=event.request_id,
            attempt=event.attempt,
            endpoint=self.endpoint,
            num_tokens=event.num_tokens,
            block_size=self.engine.layout.block_size,
            block_ids=event.block_ids,
            generations=event.generations,
            lease_s=self._lease_s,
            nonce=self._make_nonce(),
            weight_version=self._weight_version,
        )
        sealed = ticket.seal(handle, self._cluster_key)
        self.counters.kv_leases_granted += 1
        self._lent[event.request_id, event.attempt] = _Lent(handle, sealed, core.LeaseState(self._lease_s))
        self.emit(PrefillStarted(request_id=event.request_id, attempt=event.attempt, kv=sealed))

    def _on_finished(self, event: PromptFinished, now: float) -> None:
        key = (event.chunk.request_id, event.chunk.attempt)
        lent = self._lent.get(key)
        if event.lease is None or lent is None:  # complete, failed, or cancelled while it waited
            assert event.lease is None, "what is leased was started"
            self._step(key, core.Ended(), now)
            self.emit(PrefillResult(first=event.chunk, kv=None, prompt_logprobs=event.prompt_logprobs))
            return
        lent.pins = event.lease
        self._step(key, core.Finished(), now)
        self.emit(PrefillResult(first=event.chunk, kv=lent.sealed, prompt_logprobs=event.prompt_logprobs))

    def _on_notice(self, notice: notices.Notice, now: float) -> None:
        key = (notice.request_id, notice.attempt)
        lent = self._lent.get(key)
        if lent is None or not hmac.compare_digest(lent.handle.nonce, notice.nonce):
            return
        match notice:
            case notices.Renew():
                self._step(key, core.Renewed(), now)
            case notices.Done():
                self._step(key, core.Done(), now)

    def _step(self, key: _Key, event: core.LeaseEvent, now: float) -> None:
        """One transition of a lease, and what follows from it. An unknown lease is over already."""
        lent = self._lent.get(key)
        if lent is None:
            return
        lent.state, effects = core.step(lent.state, event, now)
        for effect in effects:
            match effect:
                case core.ReleaseBlocks(expired):
                    assert lent.pins is not None
                    self.engine.release(lent.pins)
                    if expired:
                        self.counters.kv_leases_expired += 1
                        logger.warning("lease of request %s attempt %d expired unread", *key)
                case core.CancelCompute():
                    self.engine.cancel(*key)
        if core.is_over(lent.state):
            del self._lent[key]


class PrefillParts:
    """A `RoleParts` (cluster/control/process.py)."""

    role = Role.PREFILL

    def make_policy(self) -> Policy:
        return PrefillPolicy()

    def make_driver(
        self, engine: Engine, transport: Transport, config: WorkerConfig, cluster_key: bytes, engine_id: str
    ) -> WorkerDriver:
        return PrefillDriver(engine, transport, engine_id=engine_id, cluster_key=cluster_key, lease_s=config.lease_s)

    def set_endpoint(self, driver: WorkerDriver, endpoint: str) -> None:
        assert isinstance(driver, PrefillDriver)
        driver.endpoint = endpoint
