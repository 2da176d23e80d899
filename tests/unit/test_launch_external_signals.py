"""What ends the waiting of a rank: its work, or a signal that all ranks get at once."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from cluster.errors import StartupError
from cluster.launch import external_signals
from cluster.launch.external_signals import StopSignals


async def fails(after_s: float) -> None:
    await asyncio.sleep(after_s)
    raise StartupError("rank 1 is gone")


async def succeeds() -> str:
    return "all have come"


async def test_a_rank_that_left_because_of_the_signal_is_not_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_signals, "SAME_SIGNAL_S", 30.0)
    signals = StopSignals()
    with signals.handled():
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(StartupError, match="SIGTERM while rank 0 waited"):
            await signals.unless_stopped(fails(0.0), "rank 0 waited")


async def test_without_a_signal_the_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_signals, "SAME_SIGNAL_S", 0.05)
    with pytest.raises(StartupError, match="rank 1 is gone"):
        await StopSignals().unless_stopped(fails(0.0), "rank 0 waited")


async def test_work_is_cancelled_at_a_signal_and_a_result_is_kept() -> None:
    signals = StopSignals()
    with signals.handled():
        assert await signals.unless_stopped(succeeds(), "rank 0 waited") == "all have come"
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGUSR1)
        with pytest.raises(StartupError, match="SIGUSR1 while rank 0 waited"):
            await signals.unless_stopped(fails(30.0), "rank 0 waited")
