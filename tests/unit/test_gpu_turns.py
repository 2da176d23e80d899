"""Turns of plans: how a graph is filled and replayed, and what is said of clock, power and the peak."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import clocks, timing
from benchmarks.gpu import turns as graph_turns
from benchmarks.gpu.clocks import UNKNOWN, Sample, peak_share, sampler
from benchmarks.gpu.sustained import LEAST_CALLS, rotation
from benchmarks.gpu.turns import BATCH_MS, Turn, Turns, replays_at_once


class NvmlError(Exception):
    pass


def nvml(power_return: int, handles: list[str]) -> SimpleNamespace:
    field = SimpleNamespace(nvmlReturn=power_return, value=SimpleNamespace(uiVal=651_000))
    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM=1,
        NVML_SUCCESS=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: handles.append(uuid),
        nvmlDeviceGetClockInfo=lambda handle, clock: 1410,
        nvmlDeviceGetFieldValues=lambda handle, fields: [field],
        nvmlDeviceGetPowerUsage=lambda handle: 600_000,
    )


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("power_return", "watts"), [(0, 651.0), (3, 600.0)])
def test_the_device_is_found_by_its_uuid_and_read(
    monkeypatch: pytest.MonkeyPatch, power_return: int, watts: float
) -> None:  # fmt: skip
    handles: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", nvml(power_return, handles))
    assert sampler()() == Sample(1410, watts)
    assert handles == ["GPU-12-ab"]


@pytest.mark.usefixtures("one_device")
def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NvmlError

    module = nvml(0, [])
    module.nvmlInit = refuse
    for each in (None, module):  # None: not installed
        monkeypatch.setitem(sys.modules, "pynvml", each)
        assert sampler()() is UNKNOWN


def test_a_peak_is_clocks_times_multiprocessors_times_flop() -> None:
    a_second_at_the_peak = 1.83e9 * 132 * clocks.BF16_FLOP_PER_CLOCK
    assert a_second_at_the_peak == pytest.approx(989.4e12, rel=1e-3)
    assert peak_share(a_second_at_the_peak, 1e3, 1830, clocks.BF16_FLOP_PER_CLOCK) == pytest.approx(1.0)
    assert peak_share(a_second_at_the_peak, 1e3, 1830, clocks.FP8_FLOP_PER_CLOCK) == pytest.approx(0.5)


@pytest.mark.parametrize("num_weights", [1, 2, 5, 8, 12])
def test_a_graph_reads_every_weight_equally_often(num_weights: int) -> None:
    indices = rotation(num_weights)
    assert LEAST_CALLS <= len(indices) < LEAST_CALLS + num_weights
    assert {indices.count(index) for index in range(num_weights)} == {len(indices) // num_weights}


def test_the_host_waits_for_small_graphs_together() -> None:
    assert replays_at_once(BATCH_MS * 3) == 1
    assert replays_at_once(BATCH_MS / 20) == 20


def turns(milliseconds: Sequence[float], sample: Sample) -> Turns:
    return Turns.of([Turn(each, sample) for each in milliseconds])


def test_turns_are_compared_round_by_round() -> None:
    base, mine = turns([1.0, 2.0, 4.0], UNKNOWN), turns([0.5, 1.8, 3.9], UNKNOWN)
    assert mine.ratio(base) == 0.9
    assert mine.median_ms == 1.8


def test_a_load_is_told_if_it_is_known() -> None:
    flop = 0.8 * 1.5e6 * 132 * 8192  # in a millisecond
    assert turns([1.0], Sample(1500, 651.2)).load(flop, 8192) == "1500MHz,651W,80%"
    assert turns([1.0], UNKNOWN).load(flop, 8192) == ""
    assert math.isnan(UNKNOWN.watts)


class Device:
    """Counts replays of half a millisecond; the host is told how far the device is behind when it waits."""

    def __init__(self) -> None:
        self.replays = 0
        self.waited_for: list[int] = []

    def replay(self) -> None:
        self.replays += 1

    def recorded(self) -> SimpleNamespace:
        at = self.replays
        return SimpleNamespace(
            at=at,
            synchronize=lambda: self.waited_for.append(at),
            elapsed_time=lambda other: 0.5 * (other.at - at),
        )


def test_a_turn_keeps_a_batch_queued_until_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(graph_turns, "capture", lambda calls: device)
    monkeypatch.setattr(graph_turns, "replay_ms", lambda graph: 0.5)
    monkeypatch.setattr(graph_turns, "recorded", device.recorded)
    monkeypatch.setattr("benchmarks.gpu.turns.time.perf_counter", iter([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]).__next__)
    turn = graph_turns.GraphTurns([lambda: None] * 10).take(2.5, lambda: Sample(1400, len(device.waited_for)))
    assert turn.ms == pytest.approx(0.05)
    assert device.waited_for == [0, 4, 8, 12]
    assert turn.sample.watts == 3, "read while the last batch still computes"


def test_the_energy_of_a_call_is_its_power_over_its_time() -> None:
    found = Turns([2.0, 1.0, 4.0], [Sample(1400, 600), Sample(1400, 700), Sample(1400, 650)])
    assert found.median_mj == pytest.approx(1300.0)


class Clock:
    """The device's time in ms, and graphs that take some of it."""

    def __init__(self) -> None:
        self.ms, self.replayed = 0.0, ""

    def graph(self, calls: Sequence[str]) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.take(*calls))

    def take(self, name: str, *calls: str) -> None:
        self.replayed += name
        self.ms += {"a": 1.0, "b": 2.0, "c": 8.0}[name] * (1 + len(calls))

    def recorded(self) -> SimpleNamespace:
        now = self.ms
        return SimpleNamespace(now=now, synchronize=lambda: None, elapsed_time=lambda end: end.now - now)


def test_variants_take_turns_in_another_order_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "capture", clock.graph)
    monkeypatch.setattr(timing, "recorded", clock.recorded)
    monkeypatch.setattr(timing, "replay_ms", lambda graph: 4.0)
    times = timing.interleaved_ms([["a", "a", "a"], ["b"], ["c"]], rounds=30, min_ms=8.0)  # type: ignore[list-item]
    assert times == [[1.0] * 30, [2.0] * 30, [8.0] * 30]
    rounds = [clock.replayed[at : at + 7] for at in range(0, len(clock.replayed), 7)]
    assert len(rounds) == 31
    assert all(each[0] == each[-1] for each in rounds), "the device waits for no launch when the first turn begins"
    orders = [each[1::2] for each in rounds]
    assert set(orders) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert all(each[1::2] == each[2::2] for each in rounds)
