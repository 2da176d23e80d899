"""The signals that stop a launch, and listening for some."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heard(numbers: Sequence[signal.Signals]) -> tuple[signal.Signals, ...]:
    """Without those that whoever started this process has had ignored: with `nohup` a lost terminal ends nothing."""
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def handled(numbers: Sequence[signal.Signals], on_signal: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Until this is left, the running event loop calls `on_signal`."""
    loop = asyncio.get_running_loop()
    numbers = heard(numbers)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
