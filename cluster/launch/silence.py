"""When a peer that says nothing is gone. A process that was itself paused must not blame its peers when it wakes: what
they said is there, and is seen at the next look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

LOOKS = 5  # at which there must be nothing in the time of a wait

_T = TypeVar("_T")


async def within(timeout_s: float, answer: Awaitable[_T]) -> _T:
    """Raises `TimeoutError`; `answer` is cancelled then."""
    waiting = asyncio.ensure_future(answer)
    try:
        for _ in range(LOOKS):
            done, _ = await asyncio.wait({waiting}, timeout=timeout_s / LOOKS)
            if done:
                return waiting.result()
        raise TimeoutError
    finally:
        waiting.cancel()


class Silence:
    """Of a peer that is asked again and again."""

    def __init__(self) -> None:
        self.ends()

    def ends(self) -> None:
        """It has answered."""
        self._heard_at, self._num_missed = time.monotonic(), 0

    def goes_on_for(self, timeout_s: float) -> bool:
        """It has not answered; whether that is so for `timeout_s`, and not for the first time."""
        self._num_missed += 1
        return self._num_missed > 1 and time.monotonic() > self._heard_at + timeout_s
