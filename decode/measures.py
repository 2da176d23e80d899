"""What a decode worker measures of its hand-overs, under vLLM's names where they mean the same."""

from __future__ import annotations

import time

from cluster.histogram import Histogram
from cluster.types import HistogramReading
from kvconnector.base import Piece, TransferId

_TIME_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_BYTE_BUCKETS = tuple(2**power for power in range(11, 35, 2))  # 2 KiB to 8 GiB
_DESCRIPTOR_BUCKETS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10_000, 20_000, 50_000)
_HANDOVER_BUCKETS_S = (0.001, 0.0025, *_TIME_BUCKETS_S, 10.0, 30.0)


class HandoverMeasures:
    """Counters since the process started, and histograms. The histograms are of the READs of KV; those of
    ledgers, a few hundred bytes each, would only blur the picture."""

    def __init__(self) -> None:
        self.num_transfers = 0
        self.num_bytes = 0
        self.num_failed_transfers = 0
        self.num_failed_loads = 0
        self.num_failed_notifications = 0
        self.num_stale_reads = 0
        self.num_wrong_digests = 0
        self.num_external_queries = 0  # tokens
        self.num_external_hits = 0
        self._transfer_s = Histogram("vllm:nixl_xfer_time_seconds", _TIME_BUCKETS_S)
        self._post_s = Histogram("vllm:nixl_post_time_seconds", (0.001, *_TIME_BUCKETS_S))
        self._bytes = Histogram("vllm:nixl_bytes_transferred", _BYTE_BUCKETS)
        self._descriptors = Histogram("vllm:nixl_num_descriptors", _DESCRIPTOR_BUCKETS)
        self._handover_s = Histogram("tandem_handover_seconds", _HANDOVER_BUCKETS_S)
        self._posted: dict[TransferId, tuple[float, int, int]] = {}  # when, bytes, descriptors

    def on_posted(self, region: str, transfer: TransferId, started_at: float, pieces: list[Piece]) -> None:
        """`started_at`: time.perf_counter before the call that posted it."""
        num_bytes = sum(piece.num_bytes for piece in pieces)
        self.num_transfers += 1
        self.num_bytes += num_bytes
        if region == "kv":
            self._post_s.observe(time.perf_counter() - started_at)
            self._posted[transfer] = (started_at, num_bytes, len(pieces))

    def on_ended(self, transfer: TransferId, *, is_good: bool) -> None:
        posted = self._posted.pop(transfer, None)
        if posted is None or not is_good:
            return
        started_at, num_bytes, num_descriptors = posted
        self._transfer_s.observe(time.perf_counter() - started_at)
        self._bytes.observe(num_bytes)
        self._descriptors.observe(num_descriptors)

    def on_loaded(self, num_tokens: int, seconds: float) -> None:
        """A hand-over has succeeded: `num_tokens` have arrived and are verified."""
        self.num_external_hits += num_tokens
        self._handover_s.observe(seconds)

    def readings(self) -> tuple[HistogramReading, ...]:
        histograms = (self._transfer_s, self._post_s, self._bytes, self._descriptors, self._handover_s)
        return tuple(histogram.reading() for histogram in histograms)
