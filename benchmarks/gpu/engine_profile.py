"""Where an engine's time goes: its steps by class, the device between them, the kernels of a few.

    python -m benchmarks.gpu engine-profile [--only prefill|decode|mixed] [--requests 512]

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
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engine import EngineBench, Workload, make_bench, mixed_workload, random_prompt
from cluster.engine.batch import Batch, StepResult
from cluster.engine.engine import Engine
from cluster.engine.gpu.runner import GpuModelRunner, LaunchedGpuStep

DECODE_BANDS = (1, 8, 32, 64, 128, 192, 224, 256)
ROW_BANDS = (128, 256, 320, 512, 1024, 2048, 4096, 8192, 16384)
MIXED_WINDOW = range(120, 132)  # all places are taken by then, and prompts follow those that end
MOST_KERNELS = 12
HOST_PARTS = ("schedule", "launch", "wait", "collect", "commit")


@dataclass(slots=True)
class StepRecord:
    """One step. Seconds of the host, and the two moments of the device between which it computes."""

    batch: Batch
    num_keys: int
    schedule_s: float
    launch_s: float = 0.0
    wait_s: float = 0.0
    collect_s: float = 0.0
    commit_s: float = 0.0
    done_at: float = 0.0
    starts: torch.cuda.Event | None = None
    ends: torch.cuda.Event | None = None

    @property
    def band(self) -> str:
        if self.batch.is_decode:
            return f"decode, to {_bound(len(self.batch.scheduled), DECODE_BANDS)} sequences"
        return f"mixed, to {_bound(self.batch.num_tokens, ROW_BANDS)} rows"

    @property
    def device_ms(self) -> float:
        return 0.0 if self.starts is None or self.ends is None else self.starts.elapsed_time(self.ends)

    def idle_ms_after(self, previous: StepRecord) -> float:
        """Of the device, from the end of the step before to where this one's inputs are staged."""
        return 0.0 if self.starts is None or previous.ends is None else previous.ends.elapsed_time(self.starts)


def _bound(size: int, bounds: Sequence[int]) -> int:
    return next((bound for bound in bounds if size <= bound), size)


class StepLog:
    """`with StepLog(engine) as log`: records every step, from inside the engine and its runner."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine._runner, GpuModelRunner)
        self.records: list[StepRecord] = []
        self.started_at = self.ended_at = 0.0
        self._engine, self._runner = engine, engine._runner
        self._has_events = self._runner._device.type == "cuda"
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
            num_keys = sum(entry.start + entry.num_tokens for entry in batch.scheduled)
            record = StepRecord(batch, num_keys, time.perf_counter() - start)
            self.records.append(record)
            self._of_step[batch.step] = record
        return batch

    def _launch(self, plain: Callable[[Batch], LaunchedGpuStep], batch: Batch) -> LaunchedGpuStep:
        record, start = self._of_step[batch.step], time.perf_counter()
        launched = plain(batch)
        record.launch_s = time.perf_counter() - start
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

    def _collect(self, plain: Callable[[LaunchedGpuStep], StepResult], step: LaunchedGpuStep) -> StepResult:
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
                f"{mean(record.batch.num_tokens for record in records):6.0f} "
                f"{mean(record.num_keys for record in records):7.0f} |          {hosts}"
            )
        print(f"{'before the first, after the last':28} {wall_s - sum(periods_s):21.3f} s of {wall_s:.3f} s")
        self._print_device(wall_s)

    def _print_device(self, wall_s: float) -> None:
        if not self._has_events or not self.records:
            return
        first, last = self.records[0].starts, self.records[-1].ends
        assert first is not None
        assert last is not None
        span_ms, idle_ms = first.elapsed_time(last), sum(self.idle_ms)
        print(
            f"device: idle between steps {idle_ms:.1f} ms, {idle_ms / span_ms:.2%} of the {span_ms:.1f} ms from the "
            f"first step's inputs to the last one's end; {1e3 * wall_s - span_ms:.1f} ms of the run lie outside",
            flush=True,
        )

    def print_steps(self, chosen: range) -> None:
        """One line for each of some steps."""
        for index in chosen:
            record = self.records[index]
            print(
                f"  step {index:4}: {record.batch.num_tokens:5} rows of {len(record.batch.scheduled):3} sequences, "
                f"{record.num_keys:7} keys, {1e3 * self.periods_s[index]:7.2f} ms, device {record.device_ms:7.2f} ms, "
                f"idle before {self.idle_ms[index]:6.3f} ms"
            )


def print_kernels(bench: EngineBench, workload: Workload, window: range) -> None:
    """Kernel time by name in a window of the steps of a workload, which is then broken off."""
    engine = bench.engine
    request_ids = bench.add(workload)
    with StepLog(engine) as log:
        _step(engine, window.start)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            start = time.perf_counter()
            _step(engine, len(window))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        for request_id in request_ids:
            engine.cancel(request_id, 0)
        while engine.has_work():
            engine.step()
    totals = [(each.self_device_time_total / 1e3, each.count, each.key) for each in profiled.key_averages()]
    totals = sorted((each for each in totals if each[0] > 0), reverse=True)
    all_ms = sum(milliseconds for milliseconds, _, _ in totals)
    print(f"{len(window)} steps, {1e3 * seconds:.1f} ms under the profiler, {all_ms:.2f} ms in {len(totals)} kernels")
    log.print_steps(range(window.start, min(window.stop, len(log.records))))
    for milliseconds, count, name in totals[:MOST_KERNELS]:
        print(f"  {milliseconds:9.3f} ms {milliseconds / all_ms:6.1%} {count:6} x  {name[:110]}")
    print(flush=True)


def _step(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def _logged(bench: EngineBench, workload: Workload) -> StepLog:
    with StepLog(bench.engine) as log:
        bench.run(workload.prompts, workload.num_tokens)
    return log


def _same(count: int, length: int, num_tokens: int, seed: int) -> Workload:
    return Workload([random_prompt(length, seed + i) for i in range(count)], [num_tokens] * count)


def profile_prefill(bench: EngineBench) -> None:
    """16 prompts of 2,048 tokens, then the kernels of one step of 8,192 rows."""
    workload = _same(16, 2048, 1, 1000)
    bench.run(workload.prompts, workload.num_tokens)
    print("\nprefill, 16 x 2048")
    log = _logged(bench, workload)
    log.print_classes()
    log.print_steps(range(len(log.records)))
    print("\nkernels of one step of prefill, 4 x 2048")
    print_kernels(bench, _same(4, 2048, 1, 1000), range(1))


def profile_decode(bench: EngineBench) -> None:
    """256 sequences, then the kernels of eight of their steps."""
    workload = _same(256, 128, 128, 5000)
    bench.run(workload.prompts, [8] * 256)
    print("\ndecode, 256 x 128 tokens")
    _logged(bench, workload).print_classes()
    print("\nkernels of decode, 256 sequences of about 200 tokens")
    print_kernels(bench, workload, range(80, 88))


def profile_mixed(bench: EngineBench, count: int) -> None:
    """The mixed workload, then the kernels of some of its steps."""
    workload = mixed_workload(count)
    warm_up = mixed_workload(min(count, 32))
    bench.run(warm_up.prompts, [32] * len(warm_up.prompts))
    print(f"\nmixed, {count} requests")
    log = _logged(bench, workload)
    log.print_classes()
    tokens = sum(map(len, workload.prompts)) + sum(workload.num_tokens)
    print(f"{tokens / (log.ended_at - log.started_at):.0f} tokens/s under the log", flush=True)
    window = MIXED_WINDOW if len(log.records) > MIXED_WINDOW.stop else range(2, len(log.records) // 2)
    print("\nkernels of the mixed workload")
    print_kernels(bench, workload, window)


def profile_engine(only: str | None, num_requests: int) -> None:
    """All, or the one that is named."""
    start = time.perf_counter()
    bench = make_bench()
    print(f"engine: {bench.engine.num_blocks} blocks, ready after {time.perf_counter() - start:.1f} s", flush=True)
    if only in (None, "prefill"):
        profile_prefill(bench)
    if only in (None, "decode"):
        profile_decode(bench)
    if only in (None, "mixed"):
        profile_mixed(bench, num_requests)
    print(f"{time.perf_counter() - start:.0f} s in all")
