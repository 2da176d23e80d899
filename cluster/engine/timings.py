"""Where the time of a sequence goes in one engine, under vLLM's names and with its buckets."""

from __future__ import annotations

from cluster.engine.batch import Batch
from cluster.engine.sequence import Sequence
from cluster.histogram import REQUEST_BUCKETS_S, TOKEN_BUCKETS, Histogram
from cluster.types import HistogramReading

STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class EngineTimings:
    """queued_at --queue--> admitted_at --prefill--> first_token_at --decode--> end

    A sequence whose KV was loaded has no prefill time here; its queue time is the hand-over, which the
    worker knows. The inference time is everything from admission on.
    """

    def __init__(self) -> None:
        self.queue = Histogram("vllm:request_queue_time_seconds", REQUEST_BUCKETS_S)
        self._prefill = Histogram("vllm:request_prefill_time_seconds", REQUEST_BUCKETS_S)
        self._decode = Histogram("vllm:request_decode_time_seconds", REQUEST_BUCKETS_S)
        self._inference = Histogram("vllm:request_inference_time_seconds", REQUEST_BUCKETS_S)
        self._computed_tokens = Histogram("vllm:request_prefill_kv_computed_tokens", TOKEN_BUCKETS)
        self._step_tokens = Histogram("vllm:iteration_tokens_total", STEP_TOKEN_BUCKETS)

    def on_admitted(self, sequence: Sequence, now: float) -> None:
        sequence.admitted_at = now
        self.queue.observe(now - sequence.queued_at)

    def on_loaded(self, sequence: Sequence, now: float) -> None:
        sequence.admitted_at = sequence.first_token_at = now

    def on_step(self, batch: Batch) -> None:
        self._step_tokens.observe(batch.num_tokens)

    def on_tokens(self, sequence: Sequence, num_tokens: int, now: float) -> None:
        """The newest `num_tokens` of the sequence have become known."""
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._prefill.observe(now - sequence.admitted_at)
            self._computed_tokens.observe(len(sequence.token_ids) - num_tokens - sequence.num_cached_tokens)

    def on_end(self, sequence: Sequence, now: float, *, hands_over: bool) -> None:
        """The regular end, or the hand-over to a decode worker."""
        assert sequence.first_token_at is not None
        self._inference.observe(now - sequence.admitted_at)
        if not hands_over:
            self._decode.observe(now - sequence.first_token_at)

    def readings(self) -> tuple[HistogramReading, ...]:
        histograms = (
            *(self.queue, self._prefill, self._decode, self._inference),
            *(self._computed_tokens, self._step_tokens),
        )
        return tuple(histogram.reading() for histogram in histograms)
