"""What a step costs the host: Python between two launches, without a GPU.

The GPU's runner over a device that answers at once: scheduling, staging, sampling, commit and events are
what they are, the kernels are stubs. Parts are exclusive of each other; microseconds of the thread's own
processor time per sequence and step, so that other processes disturb less.

    python -m benchmarks.host_step [--batch 256] [--rounds N] [--only greedy] [--dry-run]

    greedy    256 sequences decode, nothing but tokens is asked for
    sampled   the same with temperature
    logprobs  the same with temperature and the logprobs of the five most likely tokens
    mixed     200 sequences decode beside chunks of prompts that keep coming, 512 rows a step
    turnover  in every step a sequence ends, and the prompt of another takes its place

`frame` is what the event loop of a worker then does with a step's events, up to the bytes for the router;
it takes the interpreter from the engine's thread. `launch` is without the model's own launches, of which
a decode step on a GPU has one: a graph's.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.results import Parameter, append_result
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent
from cluster.engine.gpu import sampler, staging
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.sampling.logprobs import LogprobRows
from cluster.rpc import session
from cluster.types import Request, SamplingParams, TokenChunk
from decode.policy import DecodePolicy

VOCAB_SIZE = 512  # what a vocabulary costs is the device's business
BLOCK_SIZE, MAX_MODEL_LEN, POOL_BLOCKS = 64, 8192, 4096
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 256
MIXED_DECODING, MIXED_ROWS, MIXED_PROMPT = 200, 512, 2048
SKIPPED_STEPS = 8  # at both ends of a run: prompts, the first decode steps, the last tokens
OUTSIDE = ("forward", "frame")  # parts that are not the host's share of an engine's step


@dataclass(frozen=True)
class Scenario:
    name: str
    num_decoding: int
    sampling: dict[str, Any]
    max_batched_tokens: int = 8192
    has_prompts: bool = False
    has_turnover: bool = False


def scenarios(batch: int) -> list[Scenario]:
    noisy = {"temperature": 0.8, "seed": 7}
    return [
        Scenario("greedy", batch, {"temperature": 0.0}),
        Scenario("sampled", batch, noisy),
        Scenario("logprobs", batch, {**noisy, "logprobs": 5}),
        Scenario("mixed", min(MIXED_DECODING, batch), {"temperature": 0.0}, MIXED_ROWS, has_prompts=True),
        Scenario("turnover", batch, {"temperature": 0.0}, has_turnover=True),
    ]


# ---- a device that answers at once


@dataclass(frozen=True)
class _Shape:
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = (0,)
    max_position: int = MAX_MODEL_LEN


class _Model:
    """Always the same logits."""

    config = _Shape()

    def __init__(self, max_rows: int) -> None:
        self.logits_RV = torch.zeros(max_rows, VOCAB_SIZE)
        self._hidden = torch.zeros(max_rows, 1)

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(num_layers=1, num_kv_heads=1, head_size=1, block_size=block_size)

    def hidden(
        self, token_ids_T: torch.Tensor, metadata: object, kv_cache: KVCache, rows_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._hidden[: len(token_ids_T if rows_R is None else rows_R)]

    def logits(self, hidden_TK: torch.Tensor, indices_R: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits_RV[: len(hidden_TK if indices_R is None else indices_R)]


class _Ops:
    def __init__(self, max_rows: int) -> None:
        self._stats = torch.zeros(max_rows), torch.zeros(max_rows), torch.full((max_rows,), 5)

    def vocab_stats(self, logits_RV: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each[: len(logits_RV)] for each in self._stats)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """What a step launches outside of the model."""

    def nothing(*_: object, **__: object) -> None:
        pass

    def same_logprobs(
        logits_RV: torch.Tensor, logsumexp_R: torch.Tensor, tokens_R: torch.Tensor, num_top: int
    ) -> LogprobRows:
        top_ids_Rk = torch.arange(num_top).expand(len(tokens_R), num_top)
        return LogprobRows(tokens_R, logsumexp_R, tokens_R, top_ids_Rk, logits_RV[:, :num_top])

    with (
        mock.patch.object(staging, "unpack_step", nothing),
        mock.patch.object(sampler, "draw_tokens", nothing),
        mock.patch.object(sampler, "logprob_rows", same_logprobs),
    ):
        yield


def make_engine(scenario: Scenario) -> Engine:
    rows = scenario.max_batched_tokens
    model, ops = _Model(rows), _Ops(rows)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=POOL_BLOCKS * model.kv_layout(BLOCK_SIZE).block_bytes,
        max_num_sequences=256,
        max_batched_tokens=rows,
        enable_prefix_caching=False,
    )
    engine = Engine(cast(Any, model), config, cast(Any, ops), DecodePolicy(), steps_ahead=1)
    engine._runner = GpuModelRunner(
        cast(Any, model), cast(Any, ops), engine.kv_cache, device=torch.device("cpu"), max_batched_tokens=rows,
        max_num_sequences=256, max_model_len=MAX_MODEL_LEN, use_graphs=False,
    )  # fmt: skip
    return engine


# ---- time by part


@dataclass
class Parts:
    """Seconds by part, each without the parts inside it."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start = time.thread_time()
        try:
            yield
        finally:
            elapsed = time.thread_time() - start
            self.seconds[name] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def watch(self, name: str, owner: object, method: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: object, **options: object) -> object:
            with self.time(name):
                return original(*arguments, **options)

        setattr(owner, method, timed)


def _watch(engine: Engine, parts: Parts) -> None:
    runner = engine._runner
    assert isinstance(runner, GpuModelRunner)
    parts.watch("schedule", engine.scheduler, "schedule")
    parts.watch("launch", runner, "launch")
    parts.watch("stage", runner._staging, "stage")
    parts.watch("forward", runner, "_forward")
    parts.watch("forward", runner, "_forward_with_prompts")
    parts.watch("sample", runner._sampler, "sample")
    parts.watch("collect", runner, "collect")
    parts.watch("commit", engine._committer, "commit")


# ---- a run


class HostBench:
    """One engine; its requests are made as an embedding program would."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._engine = make_engine(scenario)
        self._parts = Parts()
        _watch(self._engine, self._parts)
        self._source = random.Random(5)
        self._number = 0

    def microseconds(self) -> dict[str, float]:
        """Of one run: by part, per decoding sequence and step."""
        scenario, engine = self._scenario, self._engine
        for index in range(scenario.num_decoding):
            self._add(PROMPT_TOKENS, OUTPUT_TOKENS + index * scenario.has_turnover, **scenario.sampling)
        while any(sequence.num_output_tokens == 0 for sequence in engine._sequences.values()):
            self._step()
        for _ in range(OUTPUT_TOKENS if scenario.has_turnover else SKIPPED_STEPS):
            self._step()
        self._parts.seconds.clear()
        gc.collect()
        num_steps = OUTPUT_TOKENS - 64 - 2 * SKIPPED_STEPS
        for _ in range(num_steps):
            if scenario.has_prompts and not any(each.num_unscheduled_tokens > 1 for each in engine.scheduler.running):
                self._add(MIXED_PROMPT, 1, temperature=0.0)
            while scenario.has_turnover and len(engine._sequences) < scenario.num_decoding:
                self._add(PROMPT_TOKENS, OUTPUT_TOKENS, **scenario.sampling)
            self._step()
        assert len(engine._sequences) >= scenario.num_decoding - scenario.has_turnover
        found = {
            name: 1e6 * seconds / num_steps / scenario.num_decoding for name, seconds in self._parts.seconds.items()
        }
        while engine.has_work():
            self._step()
        found["host"] = sum(value for name, value in found.items() if name not in OUTSIDE)
        return found

    def _add(self, num_prompt_tokens: int, max_tokens: int, **sampling: Any) -> None:
        self._number += 1
        params = SamplingParams(**{"max_tokens": max_tokens, "seed": 0, "ignore_eos": True, **sampling})
        token_ids = tuple(self._source.randrange(3, VOCAB_SIZE) for _ in range(num_prompt_tokens))
        self._engine.add_request(Request(request_id=f"request-{self._number}", token_ids=token_ids, sampling=params))

    def _step(self) -> None:
        with self._parts.time("engine"):
            events = self._engine.step()
        with self._parts.time("use"):
            num_tokens = 0
            for event in events:
                assert isinstance(event, TokenChunk)
                num_tokens += len(event.token_ids)
        with self._parts.time("frame"):
            _frame(events)


def _frame(events: Sequence[EngineEvent]) -> bytes:
    pending = session._Pending()
    for event in events:
        assert isinstance(event, TokenChunk)
        pending.add(event)
    return session._frame_of(pending.take()).SerializeToString()


def measure(scenario: Scenario, rounds: int) -> dict[str, float]:
    """The round in which the host's total was least, after one that is thrown away."""
    with _without_kernels():
        bench = HostBench(scenario)
        return min([bench.microseconds() for _ in range(rounds + 1)][1:], key=lambda found: found["host"])


def main() -> None:
    arguments = _parse_arguments()
    chosen = [each for each in scenarios(arguments.batch) if arguments.only in (None, each.name)]
    torch.set_num_threads(1)
    for scenario in chosen:
        found = measure(scenario, arguments.rounds)
        step_ms = found["host"] * scenario.num_decoding / 1e3
        print(f"\n{scenario.name}: {scenario.num_decoding} decoding, {step_ms:.2f} ms of Python a step")
        for name, value in found.items():
            print(f"  {name:10} {value:7.2f} us per sequence and step{'  (beside it)' * (name in OUTSIDE)}")
        if not arguments.dry_run:
            params: dict[str, Parameter] = {"scenario": scenario.name, "batch": scenario.num_decoding}
            params |= {name: round(value, 3) for name, value in found.items()}
            append_result("host_step", "host_us_per_sequence", round(found["host"], 3), "us", params)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="sequences that decode, at most 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=[each.name for each in scenarios(1)])
    parser.add_argument("--dry-run", action="store_true", help="print only, write no result lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
