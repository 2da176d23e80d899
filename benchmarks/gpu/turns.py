"""Calls over and over as replays of one CUDA graph: a launch by the host takes longer than a small product."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.gpu.clocks import Sample, peak_share
from benchmarks.gpu.timing import capture, recorded, replay_ms

BATCH_MS = 2.0  # of device time between two waits of the host


class Turn(NamedTuple):
    ms: float  # of one call
    sample: Sample  # near its end


class Turns(NamedTuple):
    """Those of one plan."""

    ms: list[float]
    samples: list[Sample]

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Turns:
        return cls([turn.ms for turn in turns], [turn.sample for turn in turns])

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    @property
    def median_mj(self) -> float:
        """Energy of a call: what decides where the card's power does."""
        return self.median_ms * statistics.median(sample.watts for sample in self.samples)

    def ratio(self, base: Turns) -> float:
        """Of time, to turns taken beside these."""
        return statistics.median(mine / other for mine, other in zip(self.ms, base.ms, strict=True))

    def load(self, flop: float, flop_per_clock: int) -> str:
        """Clock, power, and the share of the tensor cores' peak at that clock; empty if not known."""
        mhz, watts = (statistics.median(values) for values in zip(*self.samples, strict=True))
        if math.isnan(mhz):
            return ""
        return f"{mhz:.0f}MHz,{watts:.0f}W,{peak_share(flop, self.median_ms, mhz, flop_per_clock):.0%}"


class GraphTurns:
    """A graph of calls, warmed up and captured."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._graph = capture(calls)
        self._num_calls = len(calls)
        self._batch = replays_at_once(replay_ms(self._graph))

    def take(self, seconds: float, sample: Callable[[], Sample]) -> Turn:
        """At least that long. One batch of replays is queued while the host waits for another, so that the device
        never waits for the host, and the sample is taken while it still computes."""
        begun_s, num_replays = time.perf_counter(), 0
        start = last = recorded()
        while time.perf_counter() - begun_s < seconds:
            for _ in range(self._batch):
                self._graph.replay()
            num_replays += self._batch
            before, last = last, recorded()
            before.synchronize()
        found = sample()
        last.synchronize()
        return Turn(float(start.elapsed_time(last)) / (num_replays * self._num_calls), found)


def replays_at_once(once_ms: float) -> int:
    return max(1, math.ceil(BATCH_MS / max(once_ms, 1e-3)))
