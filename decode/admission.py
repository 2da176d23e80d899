"""Hand-over on the decode side: from a sealed handle to a sequence with verified KV, or to a failure.

The decisions are the core's (`kvconnector/core/load.py`, `handshake.py`); this carries them out on the
engine, the transport and the peers. Engine thread only; nothing here blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from cluster.control.messages import PeerAnswer, PeerQuestion
from cluster.engine.engine import Engine
from cluster.errors import Cancelled, HandshakeMismatch, LeaseExpired, TransferFailed
from cluster.types import Request
from decode.load import MIN_SOURCE_BLOCK_SIZE, Landing, Load, check_belongs
from decode.measures import HandoverMeasures
from decode.peers import Peers
from decode.reads import Reads
from kvconnector import notices, ticket
from kvconnector.base import Transport
from kvconnector.core import load as core
from kvconnector.digest import KVDigester
from kvconnector.ledger import Verdict
from kvconnector.mapping import Shard, plan

logger = logging.getLogger(__name__)

MAX_LOADS_READING = 16
_Key = tuple[str, int]
OnFailed = Callable[[Request, str, str], None]  # request, error code, message


class Admission:
    """All loads of one decode worker, in order of arrival: a load never overtakes an earlier one that
    waits for blocks. `on_failed` decides what becomes of a request whose KV could not be had."""

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        digester: KVDigester,
        *,
        cluster_key: bytes,
        load_timeout_s: float,
        ask: Callable[[PeerQuestion], None],
        on_failed: OnFailed,
    ) -> None:
        self._engine = engine
        self._transport = transport
        self._digester = digester
        self._cluster_key = cluster_key
        self._load_timeout_s = load_timeout_s
        self._on_failed = on_failed
        self._shard = Shard(layout=engine.layout)
        self._nonces = ticket.UsedNonces()
        self._loads: dict[_Key, Load] = {}
        self._draining: list[Load] = []  # told as failed, but READs may still land
        self._landing = Landing(
            MAX_LOADS_READING, -(-engine.max_model_len // MIN_SOURCE_BLOCK_SIZE), engine.layout.num_kv_heads
        )
        transport.register("kv", engine.kv_cache.kv_NL2HSD)
        transport.register("landing", self._landing.memory)
        self._peers = Peers(
            transport,
            self._shard,
            ask,
            on_connected=lambda key, now: self._feed_key(key, core.PeerConnected(), now),
            on_refused=self._on_refused,
            on_failed=lambda key, why, now: self._feed_key(key, core.Abort(TransferFailed.code, why), now),
        )
        self.measures = HandoverMeasures()
        is_device = engine.kv_cache.kv_NL2HSD.is_cuda
        self._reads = Reads(
            transport, self.measures, is_device=is_device, feed=self._feed, on_broken=self._peers.on_broken
        )

    @property
    def num_loads(self) -> int:
        return len(self._loads) + len(self._draining)

    @property
    def num_waiting(self) -> int:
        return len(self._loads)  # requests that are not in the engine yet

    @property
    def num_refusals(self) -> int:
        return self._peers.num_refusals

    @property
    def is_reading(self) -> bool:
        return any(load.running for load in (*self._loads.values(), *self._draining))

    def begin(self, request: Request, sealed: bytes, now: float) -> None:
        """Take a request whose KV lies elsewhere. Raises `TicketInvalid` or `InvalidRequest`; nothing is
        held then."""
        self._engine.check(request)
        handle = ticket.open_ticket(sealed, self._cluster_key)
        check_belongs(request, handle)
        self._nonces.claim(handle, now)
        state = core.LoadState(handle.lease_s, deadline=now + self._load_timeout_s)
        peer = self._peers.enter(handle.engine_id, handle.endpoint)
        load = Load(request, handle, peer, state, began_at=now)
        self._loads[load.key] = load
        self._peers.want(peer, load.key, now)

    def cancel(self, key: _Key, now: float) -> bool:
        """True if the request was a load; `on_failed` has been told then."""
        load = self._loads.get(key)
        if load is not None:
            self._feed(load, core.Abort(Cancelled.code, "the request was cancelled"), now)
        return load is not None

    def on_answer(self, answer: PeerAnswer, now: float) -> None:
        self._peers.on_answer(answer, now)

    def poll(self, now: float) -> None:
        """Reap READs, post waiting ones, tick every load. Does not depend on new requests."""
        self._transport.notifications()  # nobody should send us any; they must not pile up
        self._peers.poll(now)
        self._reads.begin_round(now)
        for load in (*self._draining, *self._loads.values()):
            self._reads.poll(load, now)
            self._feed(load, core.Tick(), now)
        self._draining = [load for load in self._draining if load.state.phase is not core.LoadPhase.FREE]

    def close(self, now: float) -> bool:
        """Abort everything; True once nothing can land any more. To be repeated with `poll` until then."""
        for load in tuple(self._loads.values()):
            self._feed(load, core.Abort(Cancelled.code, "the worker is stopping"), now)
        return not self._draining

    # ---- decisions of the core, carried out

    def _feed_key(self, key: _Key, event: core.LoadEvent, now: float) -> None:
        load = self._loads.get(key)
        if load is not None:
            self._feed(load, event, now)

    def _feed(self, load: Load, event: core.LoadEvent, now: float) -> None:
        load.state, effects = core.step(load.state, event, now)
        for effect in effects:
            self._carry_out(load, effect, now)

    def _carry_out(self, load: Load, effect: core.LoadEffect, now: float) -> None:
        match effect:
            case core.TryReserve():
                self._try_reserve(load, now)
            case core.ReadData():
                self._read_data(load, now)
            case core.ReadLedger():
                self._read_ledger(load, now)
            case core.Judge():
                self._feed(load, self._judge(load), now)
            case core.Renew():
                self._notify(load, notices.Renew(*load.key, load.handle.nonce))
            case core.TellDone():
                self._notify(load, notices.Done(*load.key, load.handle.nonce))
            case core.Commit():
                self._commit(load, now)
            case core.StartDraining():
                self._start_draining(load, now)
            case core.GiveBack():
                self._give_back(load)
            case core.Fail(code, message):
                self._fail(load, code, message)

    def _try_reserve(self, load: Load, now: float) -> None:
        """Only the oldest load that waits may take blocks, so a long prompt is not starved; nor is a sequence that has
        waited for blocks since before the load began, such as one that was preempted."""
        waiting = (each for each in self._loads.values() if each.state.phase is core.LoadPhase.WAITING)
        if next(waiting, None) is not load or self._engine.has_waited_since_before(load.began_at):
            return
        if load.landing_row is None:
            load.landing_row = self._landing.take()
            if load.landing_row is None:
                return
        load.reservation = self._engine.reserve_blocks(load.request, load.handle.num_tokens)
        if load.reservation is not None:
            needs_reads = load.reservation.num_cached_tokens < load.handle.num_tokens
            self.measures.num_external_queries += load.handle.num_tokens - load.reservation.num_cached_tokens
            self._feed(load, core.Reserved(needs_reads=needs_reads), now)

    def _read_data(self, load: Load, now: float) -> None:
        reservation, shard = load.reservation, load.peer.shard
        assert reservation is not None
        if shard is None or shard.layout.block_size != load.handle.block_size:
            why = "was disconnected" if shard is None else "has blocks of another size than its ticket"
            self._feed(load, core.Abort(TransferFailed.code, f"prefill worker {load.handle.endpoint} {why}"), now)
            return
        self._engine.blocks.start_loading(reservation)
        [pieces] = plan(
            [(shard, load.handle.block_ids)],
            (self._shard, reservation.block_ids),
            reservation.num_cached_tokens,
            load.handle.num_tokens,
        )
        self._reads.begin_data(load, pieces, now)

    def _read_ledger(self, load: Load, now: float) -> None:
        assert load.landing_row is not None
        pieces = self._landing.pieces(load.landing_row, load.handle.block_ids[load.first_read_block :])
        self._reads.begin_ledger(load, pieces, now)

    def _judge(self, load: Load) -> core.LoadEvent:
        """Compare the records that have landed with the handle, and their digests with our memory."""
        reservation, handle, first = load.reservation, load.handle, load.first_read_block
        assert reservation is not None
        assert load.landing_row is not None
        start = first * handle.block_size
        records = self._landing.records(load.landing_row, len(handle.block_ids) - first)
        match records.judge_filling(handle.generations[first:], handle.num_tokens - start, handle.block_size):
            case Verdict.NOT_FILLED:
                return core.LedgerNotFilled()
            case Verdict.STALE:
                self.measures.num_stale_reads += 1
                return core.Abort(LeaseExpired.code, "the prefill worker has reused the blocks")
        ours = self._digester.tokens(reservation.block_ids, start, handle.num_tokens)
        if (ours == records.digests()).all():
            return core.LedgerGood()
        self.measures.num_wrong_digests += 1
        return core.LedgerWrongDigest()

    def _commit(self, load: Load, now: float) -> None:
        """The engine takes over the reservation."""
        assert load.reservation is not None
        self.measures.on_loaded(load.handle.num_tokens - load.reservation.num_cached_tokens, now - load.began_at)
        self._engine.timings.queue.observe(now - load.began_at)
        self._engine.add_loaded_request(load.request, load.reservation)
        load.reservation = None
        self._forget(load)

    def _start_draining(self, load: Load, now: float) -> None:
        if load.reservation is not None:
            self._engine.blocks.abort(load.reservation)
        self._draining.append(load)
        self._reads.drop_unposted(load, now)
        if load.landing_row is not None and not load.state.reads_ledger:
            # READs of data are all that may still end, of a peer that hangs perhaps never: others need the row.
            self._landing.give_back(load.landing_row)
            load.landing_row = None

    def _give_back(self, load: Load) -> None:
        if load.reservation is not None and not self._engine.blocks.abort(load.reservation):
            self._engine.blocks.finish_draining(load.reservation)
        load.reservation = None
        self._forget(load)

    def _forget(self, load: Load) -> None:
        """Nothing of the load is held any more."""
        self._loads.pop(load.key, None)
        self._peers.leave(load.peer, load.key)
        if load.landing_row is not None:
            self._landing.give_back(load.landing_row)
            load.landing_row = None

    def _fail(self, load: Load, code: str, message: str) -> None:
        self._loads.pop(load.key, None)
        if code != Cancelled.code:  # a client that leaves is no trouble of the hand-over's
            self.measures.num_failed_loads += 1
            logger.warning("request %s attempt %d: no KV (%s): %s", *load.key, code, message)
        self._on_failed(load.request, code, message)

    def _on_refused(self, key: _Key, error: HandshakeMismatch, now: float) -> None:
        self._feed_key(key, core.Abort(error.code, error.message), now)

    def _notify(self, load: Load, notice: notices.Notice) -> None:
        has_left = self._transport.notify(load.peer.engine_id, notices.encode(notice))
        self.measures.num_failed_notifications += not has_left
