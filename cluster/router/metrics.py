"""/metrics: vLLM's names, so that its dashboards read us, and our own under `tandem_`.

Counting happens per token, rendering per scrape: observations are plain additions here, and a
collector turns them into metric families when Prometheus asks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import TandemError
from cluster.router.pool import WorkerPool
from cluster.types import FinishReason, WorkerLoad

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
ROUTER_ENGINE = "router"  # the label `engine` of what the router counts itself
LABELS = ("model_name", "engine")

_MISMATCHED_FIELD = re.compile(r"(\w+) \(ours ")

_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in the running batch.", lambda load: load.num_running),
    ("vllm:num_requests_waiting", "Sequences waiting for a place.", lambda load: load.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
        lambda load: 1.0 - load.num_free_blocks / max(1, load.num_blocks),
    ),
    ("tandem_kv_blocks", "KV blocks of the worker.", lambda load: load.num_blocks),
    (
        "tandem_kv_blocks_free",
        "Free KV blocks, unowned cached ones included.",
        lambda load: load.num_free_blocks,
    ),
    ("tandem_kv_blocks_leased", "KV blocks pinned for a reader.", lambda load: load.num_leased_blocks),
    (
        "tandem_kv_blocks_draining",
        "KV blocks still open to a transfer.",
        lambda load: load.num_draining_blocks,
    ),
)
_WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerLoad], float]], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda load: load.cache_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda load: load.cached_tokens),
    ("vllm:num_preemptions", "Sequences put back into the queue.", lambda load: load.preemptions),
    ("vllm:nixl_num_failed_transfers", "KV transfers that failed.", lambda load: load.kv_transfer_failures),
    ("vllm:nixl_num_kv_expired_reqs", "Leases that ended unread.", lambda load: load.kv_leases_expired),
    ("tandem_kv_transfers", "KV transfers started.", lambda load: load.kv_transfers),
    ("tandem_kv_bytes_pulled", "KV bytes read from prefill workers.", lambda load: load.kv_bytes_pulled),
    ("tandem_worker_handshake_refusals", "Peers a worker has refused.", lambda load: load.handshake_refusals),
    ("tandem_worker_prompt_tokens", "Prompt tokens a worker has computed.", lambda load: load.prompt_tokens),
    ("tandem_worker_generation_tokens", "Tokens a worker has sampled.", lambda load: load.generation_tokens),
)


class Histogram:
    """Counts per bucket; a value equal to a bound belongs to it, as Prometheus has it."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, model_name: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.text, labels=LABELS)
        cumulative, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        family.add_metric((model_name, ROUTER_ENGINE), cumulative, self._sum)
        return family


class RouterMetrics(Collector):
    """What one router has counted, joined at scrape time with the gauges its workers have sent."""

    def __init__(self, model_name: str, pool: WorkerPool) -> None:
        self._model_name = model_name
        self._pool = pool
        self._registry = CollectorRegistry(auto_describe=False)
        self.time_to_first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From acceptance to the first token.", FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token_latency = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", INTER_TOKEN_BUCKETS_S
        )
        self.end_to_end_latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From acceptance to the last token.", REQUEST_BUCKETS_S
        )
        self.prompt_lengths = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", TOKEN_BUCKETS)
        self.generation_lengths = Histogram(
            "vllm:request_generation_tokens", "Generated tokens of a sequence.", TOKEN_BUCKETS
        )
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self.num_releases = 0
        self._finished: Counter[str] = Counter()
        self._recoveries: Counter[tuple[str, str]] = Counter()
        self._refused_fields: Counter[str] = Counter()
        self._registry.register(self)

    def count_finish(self, reason: FinishReason) -> None:
        """vLLM's words for its dashboards: what is not stop, length or error is an abort."""
        self._finished["abort" if reason is FinishReason.CANCELLED else reason.value] += 1

    def count_recovery(self, code: str, *, is_mid_stream: bool) -> None:
        self._recoveries[code, "mid_stream" if is_mid_stream else "before_first_token"] += 1

    def count_handshake_refusal(self, error: TandemError) -> None:
        for field in _MISMATCHED_FIELD.findall(error.message) or ["unknown"]:
            self._refused_fields[field[:64]] += 1

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from (self._worker_family(GaugeMetricFamily, *row) for row in _WORKER_GAUGES)
        yield from (self._worker_family(CounterMetricFamily, *row) for row in _WORKER_COUNTERS)
        for histogram in (
            self.time_to_first_token,
            self.inter_token_latency,
            self.end_to_end_latency,
            self.prompt_lengths,
            self.generation_lengths,
        ):
            yield histogram.family(self._model_name)
        yield from self._router_counters()
        ready = GaugeMetricFamily("tandem_worker_ready", "1 while requests can be placed there.", labels=LABELS)
        in_flight = GaugeMetricFamily("tandem_worker_in_flight", "Sequences this router has there.", labels=LABELS)
        for worker in self._pool.workers:
            ready.add_metric((self._model_name, worker.name), float(worker.connection.is_ready))
            in_flight.add_metric((self._model_name, worker.name), worker.num_in_flight)
        yield ready
        yield in_flight

    def _router_counters(self) -> Iterator[Metric]:
        labels = (self._model_name, ROUTER_ENGINE)
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens of accepted sequences.", self.num_prompt_tokens),
            ("vllm:prompt_tokens_cached", "Of these, served from a prefix cache.", self.num_cached_tokens),
            ("vllm:generation_tokens", "Tokens generated.", self.num_generation_tokens),
            ("tandem_releases", "Prefill results nobody read, released by the router.", self.num_releases),
        ):
            family = CounterMetricFamily(name, text, labels=LABELS)
            family.add_metric(labels, value)
            yield family
        finished = CounterMetricFamily("vllm:request_success", "Ended sequences.", labels=(*LABELS, "finished_reason"))
        for reason in ("stop", "length", "abort", "error"):
            finished.add_metric((*labels, reason), self._finished[reason])
        yield finished
        recoveries = CounterMetricFamily(
            "tandem_recoveries", "Attempts that failed and were made again.", labels=(*LABELS, "code", "when")
        )
        for (code, when), count in self._recoveries.items():
            recoveries.add_metric((*labels, code, when), count)
        yield recoveries
        refusals = CounterMetricFamily(
            "tandem_handshake_refusals", "Pairs that do not fit, by field.", labels=(*LABELS, "field")
        )
        for field, count in self._refused_fields.items():
            refusals.add_metric((*labels, field), count)
        yield refusals

    def _worker_family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        read: Callable[[WorkerLoad], float],
    ) -> Metric:
        family = kind(name, text, labels=LABELS)
        for worker in self._pool.workers:
            load = worker.connection.load
            if load is not None:
                family.add_metric((self._model_name, worker.name), read(load))
        return family
