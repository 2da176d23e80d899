"""From single requests to percentiles, in bounded memory."""

from __future__ import annotations

import random
from array import array
from collections import Counter, defaultdict

import msgspec

from cluster.bench.options import Slo

MAX_SAMPLES = 200_000  # per quantity; beyond it a uniform sample of them (mean, maximum and count stay exact)
MAX_SECONDS = 4 * 3600  # of the throughput curve
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
NUM_CURVE_POINTS = 200


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One measured request; times in seconds. `error` empty: it was answered to its end."""

    index: int
    started_s: float  # since the beginning of the measurement
    lag_s: float = 0.0  # sent so much later than planned (open loop)
    e2e_s: float
    ttft_s: float | None = None
    itl_s: float | None = None  # (last - first) / (tokens - 1)
    max_itl_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None
    error: str = ""
    message: str = ""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one quantity. `percentiles` are parallel to PERCENTILES."""

    count: int
    mean: float
    maximum: float
    percentiles: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.percentiles[0]


class Samples:
    """All values up to MAX_SAMPLES, a uniform sample of them beyond (algorithm R)."""

    def __init__(self, capacity: int = MAX_SAMPLES) -> None:
        self._capacity = capacity
        self._values = array("d")
        self._rng = random.Random(0)
        self._sum = 0.0
        self._maximum = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        self._sum += value
        self._maximum = max(self._maximum, value)
        if len(self._values) < self._capacity:
            self._values.append(value)
        elif (slot := self._rng.randrange(self.count)) < self._capacity:
            self._values[slot] = value

    def statistics(self) -> Statistics | None:
        """None: there is no value."""
        if not self.count:
            return None
        ordered = sorted(self._values)
        return Statistics(
            count=self.count,
            mean=self._sum / self.count,
            maximum=self._maximum,
            percentiles=tuple(quantile(ordered, percent / 100) for percent in PERCENTILES),
        )

    def curve(self) -> list[tuple[float, float]]:
        """The cumulative distribution as (value, share) points."""
        ordered = sorted(self._values)
        steps = [index / (NUM_CURVE_POINTS - 1) for index in range(NUM_CURVE_POINTS)]
        return [(quantile(ordered, share), share) for share in steps] if ordered else []


def quantile(ordered: list[float], share: float) -> float:
    """Linear between neighbours. `ordered` is not empty."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has shown. Rates are per second of `duration_s`, the time from the first request to the
    end of the last one."""

    duration_s: float
    num_requests: int
    num_failed: int
    errors: dict[str, int]
    error_examples: dict[str, str] = {}  # by kind: what the first of them said
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float | None  # requests that met the SLO; None: no SLO was given
    good_share: float | None
    ttft: Statistics | None
    itl: Statistics | None  # gaps between chunks, of all requests together
    tpot: Statistics | None  # mean gap of each request
    e2e: Statistics | None
    lag: Statistics | None
    mean_prompt_tokens: float
    mean_output_tokens: float


class Meter:
    """Takes requests one by one. `slo` without bounds: no goodput."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self.ttft, self.itl, self.tpot, self.e2e, self.lag = (Samples() for _ in range(5))
        self.errors: Counter[str] = Counter()
        self.error_examples: dict[str, str] = {}
        self.num_requests = 0
        self.num_good = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.first_s: float | None = None
        self.last_s = 0.0
        self.tokens_by_second: defaultdict[int, float] = defaultdict(float)
        self.scatter: list[tuple[float, float]] = []  # (started_s, ttft_s) of a bounded number of requests

    @property
    def num_failed(self) -> int:
        return self.errors.total()

    def add(self, record: RequestRecord, gaps: array[float]) -> None:
        self.num_requests += 1
        self.first_s = record.started_s if self.first_s is None else min(self.first_s, record.started_s)
        self.last_s = max(self.last_s, record.started_s + record.e2e_s)
        self.lag.add(record.lag_s)
        if record.error or record.ttft_s is None:
            kind = record.error or "empty"
            self.errors[kind] += 1
            if record.message:
                self.error_examples.setdefault(kind, record.message)
            return
        self.ttft.add(record.ttft_s)
        self.e2e.add(record.e2e_s)
        for gap in gaps:
            self.itl.add(gap)
        if record.itl_s is not None:
            self.tpot.add(record.itl_s)
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_output_tokens += record.num_output_tokens
        self.num_good += meets(record, self._slo)
        if len(self.scatter) < NUM_CURVE_POINTS * 10:
            self.scatter.append((record.started_s, record.ttft_s))
        self._count_tokens(record.started_s + record.ttft_s, gaps, record.num_output_tokens / (1 + len(gaps)))

    def _count_tokens(self, at: float, gaps: array[float], num_tokens: float) -> None:
        """`num_tokens` for each chunk, the mean: the stream does not tell how many a chunk has."""
        self.tokens_by_second[min(int(at), MAX_SECONDS)] += num_tokens
        for gap in gaps:
            at += gap
            self.tokens_by_second[min(int(at), MAX_SECONDS)] += num_tokens

    def summary(self) -> Summary:
        duration_s = max(self.last_s - (self.first_s or 0.0), 1e-9)
        num_ok = self.num_requests - self.num_failed
        has_slo = self._slo != Slo()
        return Summary(
            duration_s=duration_s,
            num_requests=self.num_requests,
            num_failed=self.num_failed,
            errors=dict(self.errors),
            error_examples=dict(self.error_examples),
            requests_per_s=num_ok / duration_s,
            input_tokens_per_s=self.num_prompt_tokens / duration_s,
            output_tokens_per_s=self.num_output_tokens / duration_s,
            goodput_per_s=self.num_good / duration_s if has_slo else None,
            good_share=self.num_good / max(1, self.num_requests) if has_slo else None,
            ttft=self.ttft.statistics(),
            itl=self.itl.statistics(),
            tpot=self.tpot.statistics(),
            e2e=self.e2e.statistics(),
            lag=self.lag.statistics(),
            mean_prompt_tokens=self.num_prompt_tokens / max(1, num_ok),
            mean_output_tokens=self.num_output_tokens / max(1, num_ok),
        )


def meets(record: RequestRecord, slo: Slo) -> bool:
    """A quantity that a request does not have (one token has no gap) meets its bound."""
    measured = ((slo.ttft, record.ttft_s), (slo.itl, record.itl_s), (slo.max_itl, record.max_itl_s))
    return all(
        bound is None or value is None or value <= bound for bound, value in (*measured, (slo.e2e, record.e2e_s))
    )
