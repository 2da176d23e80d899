"""When the requests of an open loop are sent. Pure, so that a test can look at the times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal


def arrival_times(kind: Literal["poisson", "constant"], rate: float, seed: int) -> Iterator[float]:
    """Seconds since the beginning, without end; the first one is at 0. The times do not depend on how the
    server fares, which is what makes the loop open."""
    rng = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        yield at
        at += rng.expovariate(rate) if kind == "poisson" else 1.0 / rate
