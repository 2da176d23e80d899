"""Histograms as Prometheus has them. Observing is an addition; what is read is frozen and can be sent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from cluster.types import HistogramReading

# vLLM's, for what is measured in several places
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Histogram:
    """Counts per bucket; a value equal to a bound belongs to it. One thread."""

    def __init__(self, name: str, bounds: Sequence[float]) -> None:
        self.name = name
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        self._reading: HistogramReading | None = None

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        self._reading = None

    def reading(self) -> HistogramReading:
        """The same object as before if nothing was observed since."""
        if self._reading is None:
            self._reading = HistogramReading(self.name, self._bounds, tuple(self._counts), self._sum)
        return self._reading
