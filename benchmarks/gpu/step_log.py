"""A log of an engine's steps on a GPU: what each of them was, and where host and device spent its time.

A step's time is what passed since the one before it was done; device time runs from the moment its inputs are
staged. What a host column shows hides behind the device as long as `wait` is above zero.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from cluster.engine.batch import Batch, DecodedTokens, StepResult
from cluster.engine.engine import Engine
from cluster.engine.gpu.runner import GpuModelRunner, LaunchedGpuStep

DECODE_BANDS = (1, 8, 32, 64, 128, 192, 224, 256)
ROW_BANDS = (128, 256, 320, 512, 1024, 2048, 4096, 8192, 16384)
_Result = StepResult | DecodedTokens
HOST_PARTS = ("schedule", "launch", "wait", "collect", "commit")


@dataclass(slots=True)
class StepRecord:
    """One step. Seconds of the host, and the two moments of the device between which it computes."""

    step: int
    num_rows: int
    num_sequences: int
    num_keys: int
    is_decode: bool
    schedule_s: float
    launch_s: float = 0.0
    wait_s: float = 0.0
    collect_s: float = 0.0
    commit_s: float = 0.0
    done_at: float = 0.0
    starts: torch.cuda.Event | None = None
    ends: torch.cuda.Event | None = None
    is_prompt_graph: bool = False  # a step with prompts that was a graph

    @property
    def band(self) -> str:
        if self.is_decode:
            return f"decode, to {_bound(self.num_sequences, DECODE_BANDS)} sequences"
        kind = "mixed graph" if self.is_prompt_graph else "mixed"
        return f"{kind}, to {_bound(self.num_rows, ROW_BANDS)} rows"

    @property
    def host_ms(self) -> float:
        """Without waiting for the device."""
        return 1e3 * (self.schedule_s + self.launch_s + self.collect_s + self.commit_s)

    @property
    def device_ms(self) -> float:
        return 0.0 if self.starts is None or self.ends is None else self.starts.elapsed_time(self.ends)

    def idle_ms_after(self, previous: StepRecord) -> float:
        """Of the device, from the end of the step before to where this one's inputs are staged."""
        return 0.0 if self.starts is None or previous.ends is None else previous.ends.elapsed_time(self.starts)


@dataclass(frozen=True, slots=True)
class StepMeans:
    """Of some steps, in milliseconds."""

    count: int
    num_graphs: int  # of steps with prompts
    step_ms: float
    device_ms: float
    host_ms: float
    launch_ms: float  # of the host's
    wait_ms: float  # beside the host's


def _bound(size: int, bounds: Sequence[int]) -> int:
    return next((bound for bound in bounds if size <= bound), size)


def _size(batch: Batch) -> tuple[int, int]:
    """Sequences, and the sum of their contexts. A cohort is not asked for its entries, which it makes for nobody
    else."""
    if batch.cohort is not None:
        count = len(batch.cohort.sequences)
        return count, sum(batch.cohort.starts) + count * (batch.age + 1)
    return len(batch.scheduled), sum(entry.start + entry.num_tokens for entry in batch.scheduled)


class StepLog:
    """`with StepLog(engine) as log`: records every step, from inside the engine and its runner."""

    def __init__(self, engine: Engine, *, has_events: bool = True) -> None:
        """`has_events` False: the host's times alone, undisturbed by the device's."""
        assert isinstance(engine._runner, GpuModelRunner)
        self.records: list[StepRecord] = []
        self.started_at = self.ended_at = 0.0
        self._engine, self._runner = engine, engine._runner
        self._has_events = has_events and self._runner._device.type == "cuda"
        self._of_step: dict[int, StepRecord] = {}
        self._staged: torch.cuda.Event | None = None
        self._restores: list[Callable[[], None]] = []

    def __enter__(self) -> StepLog:
        runner, engine = self._runner, self._engine
        self._replace(engine.scheduler, "schedule", self._schedule)
        self._replace(runner, "launch", self._launch)
        self._replace(runner._staging, "stage", self._stage)
        self._replace(runner, "collect", self._collect)
        self._replace(engine._committer, "commit", self._commit)
        self.started_at = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended_at = time.perf_counter()
        for restore in self._restores:
            restore()
        if self._has_events:
            torch.cuda.synchronize()

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        plain = getattr(owner, name)
        setattr(owner, name, lambda *arguments: method(plain, *arguments))
        self._restores.append(lambda: delattr(owner, name))

    def _schedule(self, plain: Callable[[], Batch | None]) -> Batch | None:
        start = time.perf_counter()
        batch = plain()
        if batch is not None:
            seconds = time.perf_counter() - start
            record = StepRecord(batch.step, batch.num_tokens, *_size(batch), batch.cohort is not None, seconds)
            self.records.append(record)
            self._of_step[batch.step] = record
        return batch

    def _launch(self, plain: Callable[[Batch], LaunchedGpuStep], batch: Batch) -> LaunchedGpuStep:
        record, num_replays = self._of_step[batch.step], self._num_replays
        start = time.perf_counter()
        launched = plain(batch)
        record.launch_s = time.perf_counter() - start
        record.is_prompt_graph = self._num_replays > num_replays
        record.starts, record.ends = self._staged, self._event()
        return launched

    def _stage(self, plain: Callable[..., Any], *arguments: Any) -> Any:
        staged = plain(*arguments)
        self._staged = self._event()
        return staged

    def _event(self) -> torch.cuda.Event | None:
        if not self._has_events:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self, plain: Callable[[LaunchedGpuStep], _Result], step: LaunchedGpuStep) -> _Result:
        record, start = self._of_step[step.batch.step], time.perf_counter()
        step.is_done.wait()
        record.done_at = time.perf_counter()
        record.wait_s = record.done_at - start
        result = plain(step)
        record.collect_s = time.perf_counter() - record.done_at
        return result

    def _commit(self, plain: Callable[..., None], batch: Batch, *arguments: Any) -> None:
        start = time.perf_counter()
        plain(batch, *arguments)
        self._of_step[batch.step].commit_s = time.perf_counter() - start

    @property
    def _num_replays(self) -> int:
        graphs = self._runner.prompt_graphs
        return 0 if graphs is None else graphs.num_replays

    # ---- what it shows

    @property
    def periods_s(self) -> list[float]:
        """Of each step: since the one before it was done."""
        times = [self.started_at, *(record.done_at for record in self.records)]
        return [after - before for before, after in pairwise(times)]

    @property
    def idle_ms(self) -> list[float]:
        """Of the device before each step; the first step's wait for the host is not among them."""
        return [0.0, *(record.idle_ms_after(previous) for previous, record in pairwise(self.records))]

    def means(self, *, is_decode: bool) -> StepMeans:
        """Of the steps that only decode, or of the others."""
        chosen = [
            (record, period)
            for record, period in zip(self.records, self.periods_s, strict=True)
            if record.is_decode == is_decode
        ]
        if not chosen:
            return StepMeans(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        records, periods_s = zip(*chosen, strict=True)
        return StepMeans(
            count=len(records),
            num_graphs=sum(record.is_prompt_graph for record in records),
            step_ms=1e3 * statistics.fmean(periods_s),
            device_ms=statistics.fmean(record.device_ms for record in records),
            host_ms=statistics.fmean(record.host_ms for record in records),
            launch_ms=1e3 * statistics.fmean(record.launch_s for record in records),
            wait_ms=1e3 * statistics.fmean(record.wait_s for record in records),
        )

    @property
    def idle_share(self) -> float:
        """Of the device, from the first step's inputs to the last one's end; 0 without events."""
        span_ms = self._span_ms()
        return sum(self.idle_ms) / span_ms if span_ms else 0.0

    def _span_ms(self) -> float:
        if not self._has_events or not self.records:
            return 0.0
        first, last = self.records[0].starts, self.records[-1].ends
        assert first is not None
        assert last is not None
        span_ms: float = first.elapsed_time(last)
        return span_ms

    def host_fraction(self, num_sequences: int) -> float:
        """Share of the decode steps of that many sequences in which the host does not wait for the device. Of
        those that follow another one: neither a prompt's launches nor its computing are in what is measured."""
        is_counted = [record.is_decode and record.num_sequences == num_sequences for record in self.records]
        period_s = wait_s = 0.0
        for (has_other, is_decode), (previous, record) in zip(
            pairwise(is_counted), pairwise(self.records), strict=True
        ):
            if has_other and is_decode:
                period_s += record.done_at - previous.done_at
                wait_s += record.wait_s
        if period_s == 0.0:
            raise ValueError(f"no decode step of {num_sequences} sequences follows another one")
        return 1.0 - wait_s / period_s

    def print_classes(self) -> None:
        """One line a class of step, those that took most first, and where the rest of the time went."""
        wall_s, periods_s, idle_ms = self.ended_at - self.started_at, self.periods_s, self.idle_ms
        classes: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(self.records):
            classes[record.band].append(index)
        parts = " ".join(f"{part:>8}" for part in HOST_PARTS)
        print(
            f"{'class of step':28} {'steps':>6} {'s':>7} {'share':>6} {'mean ms':>8} {'device':>7} {'idle':>6} "
            f"{'rows':>6} {'keys':>7} | host ms: {parts}"
        )
        for name, members in sorted(classes.items(), key=lambda item: -sum(periods_s[i] for i in item[1])):
            total_s = sum(periods_s[index] for index in members)
            records = [self.records[index] for index in members]

            def mean(values: Iterable[float]) -> float:
                return statistics.fmean(values)

            hosts = " ".join(
                f"{1e3 * mean(getattr(record, f'{part}_s') for record in records):8.2f}" for part in HOST_PARTS
            )
            print(
                f"{name:28} {len(members):6} {total_s:7.2f} {total_s / wall_s:6.1%} "
                f"{1e3 * total_s / len(members):8.2f} {mean(record.device_ms for record in records):7.2f} "
                f"{mean(idle_ms[index] for index in members):6.2f} "
                f"{mean(record.num_rows for record in records):6.0f} "
                f"{mean(record.num_keys for record in records):7.0f} |          {hosts}"
            )
        print(f"{'before the first, after the last':28} {wall_s - sum(periods_s):21.3f} s of {wall_s:.3f} s")
        self._print_device(wall_s)

    def _print_device(self, wall_s: float) -> None:
        span_ms, idle_ms = self._span_ms(), sum(self.idle_ms)
        if not span_ms:
            return
        print(
            f"device: idle between steps {idle_ms:.1f} ms, {self.idle_share:.2%} of the {span_ms:.1f} ms from the "
            f"first step's inputs to the last one's end; {1e3 * wall_s - span_ms:.1f} ms of the run lie outside",
            flush=True,
        )

    def print_steps(self, chosen: range) -> None:
        """One line for each of some steps."""
        for index in chosen:
            record = self.records[index]
            print(
                f"  step {index:4}: {record.num_rows:5} rows of {record.num_sequences:3} sequences, "
                f"{record.num_keys:7} keys, {1e3 * self.periods_s[index]:7.2f} ms, device {record.device_ms:7.2f} ms, "
                f"idle before {self.idle_ms[index]:6.3f} ms"
            )
