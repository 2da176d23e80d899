"""/metrics: what one router has counted, joined at scrape time with what its workers have sent.

Counting happens per token, rendering per scrape: observations are plain additions here, and a
collector turns them into metric families when Prometheus asks. `metric_tables.py` says what exists.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import TandemError
from cluster.histogram import Histogram
from cluster.router.metric_tables import (
    EXTRA_LABELS,
    ROUTER_COUNTERS,
    ROUTER_HISTOGRAMS,
    WORKER_COUNTERS,
    WORKER_GAUGES,
    WORKER_HISTOGRAMS,
    WORKER_STATES,
)
from cluster.router.pool import Worker, WorkerPool
from cluster.types import FinishReason, HistogramReading, Role, WorkerLoad

ROUTER_ENGINE = "router"  # the label `engine` of what the router counts itself
LABELS = ("model_name", "engine")

_MISMATCHED_FIELD = re.compile(r"(\w+) \(ours ")


class RouterMetrics(Collector):
    """Counts for one router. One event loop."""

    def __init__(self, model_name: str, pool: WorkerPool) -> None:
        self._model_name = model_name
        self._pool = pool
        self._registry = CollectorRegistry(auto_describe=False)
        self.histograms = {name: Histogram(name, bounds) for name, _, bounds in ROUTER_HISTOGRAMS}
        self.time_to_first_token = self.histograms["vllm:time_to_first_token_seconds"]
        self.inter_token_latency = self.histograms["vllm:inter_token_latency_seconds"]
        self.time_per_output_token = self.histograms["vllm:request_time_per_output_token_seconds"]
        self.end_to_end_latency = self.histograms["vllm:e2e_request_latency_seconds"]
        self.prompt_lengths = self.histograms["vllm:request_prompt_tokens"]
        self.generation_lengths = self.histograms["vllm:request_generation_tokens"]
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generation_tokens = 0
        self.num_releases = 0
        self.num_failovers = 0
        self._finished: Counter[str] = Counter()
        self._recoveries: Counter[tuple[str, str]] = Counter()
        self._refused_fields: Counter[str] = Counter()
        self._responses: Counter[tuple[str, str]] = Counter()
        self._registry.register(self)

    def count_finish(self, reason: FinishReason) -> None:
        """vLLM's words for its dashboards: what is not stop, length or error is an abort."""
        self._finished["abort" if reason is FinishReason.CANCELLED else reason.value] += 1

    def count_recovery(self, code: str, *, is_mid_stream: bool) -> None:
        self._recoveries[code, "mid_stream" if is_mid_stream else "before_first_token"] += 1

    def count_response(self, handler: str, status: int) -> None:
        self._responses[handler, str(status)] += 1

    def count_handshake_refusal(self, error: TandemError) -> None:
        for field in _MISMATCHED_FIELD.findall(error.message) or ["unknown"]:
            self._refused_fields[field[:64]] += 1

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from (self._worker_family(GaugeMetricFamily, *row) for row in WORKER_GAUGES)
        yield from (self._worker_family(CounterMetricFamily, *row) for row in WORKER_COUNTERS)
        yield self._accepted_per_position()
        yield from (self._worker_histogram(*row) for row in WORKER_HISTOGRAMS)
        for name, text, _ in ROUTER_HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=LABELS)
            self._add(family, ROUTER_ENGINE, self.histograms[name].reading())
            yield family
        for name, text, read in ROUTER_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric((self._model_name, ROUTER_ENGINE), read(self))
            yield counter
        yield from self._labelled_counters()
        yield from self._pool_gauges()

    def _labelled_counters(self) -> Iterator[Metric]:
        finished = {(reason,): self._finished[reason] for reason in ("stop", "length", "abort", "error")}
        yield self._labelled("vllm:request_success", "Ended sequences.", finished)
        yield self._labelled("tandem_recoveries", "Attempts that failed and were made again.", self._recoveries)
        yield self._labelled(
            "tandem_http_responses",
            "Answers to HTTP requests; 499: the client had left. `none`: no endpoint's.",
            self._responses,
        )
        refused = {(field,): count for field, count in self._refused_fields.items()}
        yield self._labelled("tandem_handshake_refusals", "Pairs that do not fit, by field.", refused)

    def _labelled(
        self,
        name: str,
        text: str,
        counts: Mapping[tuple[str, ...], int] | Mapping[tuple[str], int] | Mapping[tuple[str, str], int],
    ) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*LABELS, *EXTRA_LABELS[name]))
        for values, count in counts.items():
            family.add_metric((self._model_name, ROUTER_ENGINE, *values), count)
        return family

    def _pool_gauges(self) -> Iterator[Metric]:
        workers = self._pool.workers
        ready = GaugeMetricFamily("tandem_worker_ready", "1 while requests can be placed there.", labels=LABELS)
        in_flight = GaugeMetricFamily("tandem_worker_in_flight", "Sequences this router has there.", labels=LABELS)
        drains = CounterMetricFamily("tandem_worker_drains", "How often a worker began to drain.", labels=LABELS)
        for worker in workers:
            labels = (self._model_name, worker.name)
            ready.add_metric(labels, float(worker.connection.is_ready))
            in_flight.add_metric(labels, worker.num_in_flight)
            drains.add_metric(labels, worker.connection.num_drains)
        yield from (ready, in_flight, drains)
        labels_of_state = (*LABELS, *EXTRA_LABELS["tandem_workers"])
        states = GaugeMetricFamily("tandem_workers", "Workers by role and state.", labels=labels_of_state)
        counts = Counter((worker.connection.role, _state(worker)) for worker in workers)
        for role in Role:
            for state in WORKER_STATES:
                states.add_metric((self._model_name, ROUTER_ENGINE, role.value, state), counts[role, state])
        yield states

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

    def _accepted_per_position(self) -> Metric:
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        text = "Accepted draft tokens by their place in the proposal, from 0; none without speculation."
        family = CounterMetricFamily(name, text, labels=(*LABELS, *EXTRA_LABELS[name]))
        for worker in self._pool.workers:
            load = worker.connection.load
            for position, count in enumerate(() if load is None else load.spec_accepted_per_position):
                family.add_metric((self._model_name, worker.name, str(position)), count)
        return family

    def _worker_histogram(self, name: str, text: str) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        for worker in self._pool.workers:
            load = worker.connection.load
            for reading in () if load is None else load.histograms:
                if reading.name == name:
                    self._add(family, worker.name, reading)
        return family

    def _add(self, family: HistogramMetricFamily, engine: str, reading: HistogramReading) -> None:
        cumulative, total = [], 0
        for bound, count in zip((*map(str, reading.bounds), "+Inf"), reading.counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        family.add_metric((self._model_name, engine), cumulative, reading.sum)


def _state(worker: Worker) -> str:
    if worker.connection.is_ready:
        return "ready"
    return "unreachable" if worker.connection.last_error else "draining"
