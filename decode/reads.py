"""READs of a decode worker: posted a few at a time, reaped, given up where they stand still.

What becomes of a READ is told to the core of its load (`feed`). Engine thread only; nothing here blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from cluster.errors import TransferFailed
from decode.load import Load
from decode.measures import HandoverMeasures
from decode.peers import Peer
from kvconnector.base import Piece, TransferState, Transport
from kvconnector.core import load as core

# A READ of host memory within one machine may be over when it is posted, so this bounds how long the engine
# waits; between GPUs it never is, and few large ones are fastest.
MAX_READ_BYTES = 8 << 20
MAX_DEVICE_READ_BYTES = 256 << 20
MAX_READ_PIECES = 1024
MAX_READS_AT_ONCE = 2  # of one load
# A READ without an end for so long, and for what its bytes may take, stands still: its source was paused or is cut off.
STALL_S, SLOWEST_BYTES_PER_S = 5.0, 100e6
SETTLE_S = 1.0  # pieces of a READ that failed may be on their way: copies within a machine or a fabric take far less


class Reads:
    """Of all loads of one worker. `on_broken`: a READ from this peer has failed."""

    def __init__(
        self,
        transport: Transport,
        measures: HandoverMeasures,
        *,
        is_device: bool,
        feed: Callable[[Load, core.LoadEvent, float], None],
        on_broken: Callable[[Peer, float], None],
    ) -> None:
        self._transport = transport
        self._measures = measures
        self._feed = feed
        self._on_broken = on_broken
        self._max_read_bytes = MAX_DEVICE_READ_BYTES if is_device else MAX_READ_BYTES
        self._stalled_s = STALL_S + MAX_READS_AT_ONCE * self._max_read_bytes / SLOWEST_BYTES_PER_S
        self._polled_at = 0.0
        self._was_away = False

    def begin_data(self, load: Load, pieces: Sequence[Piece], now: float) -> None:
        """Of KV, to where its reservation has it."""
        assert not load.unposted
        self._begin(load, "kv", "kv", batches(pieces, self._max_read_bytes), now)

    def begin_ledger(self, load: Load, pieces: Sequence[Piece], now: float) -> None:
        """Of records, to the load's landing row."""
        self._begin(load, "ledger", "landing", batches(pieces), now)

    def _begin(self, load: Load, region: str, local_region: str, parts: Iterator[list[Piece]], now: float) -> None:
        load.unposted.extend((region, local_region, part) for part in parts)
        self._feed(load, core.Posted(len(load.unposted)), now)
        self._post(load, now)

    def drop_unposted(self, load: Load, now: float) -> None:
        """They will never be posted; those that run may still land."""
        num_unposted = len(load.unposted)
        load.unposted.clear()
        for _ in range(num_unposted):
            self._feed(load, core.ReadDone(), now)

    def begin_round(self, now: float) -> None:
        """Before a round of `poll`. After a long step nothing is known of READs meanwhile."""
        self._was_away = now - self._polled_at > STALL_S / 2
        self._polled_at = now

    def poll(self, load: Load, now: float) -> None:
        """Reap what has ended, post what waits."""
        if self._was_away:
            load.moved_at = now
        while load.settling and load.settling[0] <= now:
            load.settling.popleft()
            self._feed(load, core.ReadDone(), now)
        for transfer in tuple(load.running):
            match self._transport.poll(transfer):
                case TransferState.RUNNING:
                    continue
                case TransferState.DONE:
                    self._measures.on_ended(transfer, is_good=True)
                    load.running.remove(transfer)
                    load.moved_at = now
                    self._feed(load, core.ReadDone(), now)
                case TransferState.FAILED:
                    self._measures.on_ended(transfer, is_good=False)
                    load.running.remove(transfer)
                    self._on_failed(load, "a READ failed", now)
        self._post(load, now)
        if load.running and load.state.phase is core.LoadPhase.LOADING and now - load.moved_at > self._stalled_s:
            why = f"prefill worker {load.handle.endpoint}: no READ has ended for {self._stalled_s:.1f} s"
            self._feed(load, core.Abort(TransferFailed.code, why), now)

    def _post(self, load: Load, now: float) -> None:
        while load.unposted and len(load.running) < MAX_READS_AT_ONCE:
            region, local_region, pieces = load.unposted.popleft()
            started_at = time.perf_counter()
            try:
                transfer = self._transport.read(load.peer.engine_id, region, local_region, pieces)
            except TransferFailed as error:
                self._on_failed(load, error.message, now)
                return
            load.running.append(transfer)
            load.moved_at = now
            self._measures.on_posted(region, transfer, started_at, pieces)

    def _on_failed(self, load: Load, why: str, now: float) -> None:
        self._measures.num_failed_transfers += 1
        self._on_broken(load.peer, now)
        load.settling.append(now + SETTLE_S)
        self._feed(load, core.Abort(TransferFailed.code, f"prefill worker {load.handle.endpoint}: {why}"), now)


def batches(pieces: Sequence[Piece], max_bytes: int = MAX_READ_BYTES) -> Iterator[list[Piece]]:
    """Cut into READs of at most `max_bytes` and MAX_READ_PIECES; large pieces are split."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in _split(pieces, max_bytes):
        if batch and (num_bytes + piece.num_bytes > max_bytes or len(batch) >= MAX_READ_PIECES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += piece.num_bytes
    if batch:
        yield batch


def _split(pieces: Sequence[Piece], max_bytes: int) -> Iterator[Piece]:
    for piece in pieces:
        for start in range(0, piece.num_bytes, max_bytes):
            num_bytes = min(max_bytes, piece.num_bytes - start)
            yield Piece(piece.source_offset + start, piece.destination_offset + start, num_bytes)
