"""The same bits whatever the topology, on a GPU: every way to compute some requests against each alone.

Compared per request: token ids, logprob bits (of the token and of the 5 most likely), a digest of the fp32
logits of every drawn row, a digest of the KV of every stored position.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch

from benchmarks.gpu.exactness_answers import Answer, LogitsWatch, take
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.events import PromptFinished
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.types import Request, SamplingParams, TokenChunk
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 333, 511, 512, 513, 640, 1025)
SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0, "logprobs": 5},
    {"temperature": 0.0, "logprobs": 5, "prompt_logprobs": 1},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "logprobs": 5},
    {"temperature": 1.1, "min_p": 0.02, "logprobs": 5, "frequency_penalty": 0.5},
)
NEIGHBOUR_PROMPT, NEIGHBOUR_TOKENS = 40, 48  # the longest prompt of a neighbour; what each is answered with


class Cell(NamedTuple):
    """One way to compute all requests. `at_once`: how many are given to the engine together; `num_neighbours`: other
    requests that come before them and decode beside them, of which nothing is compared."""

    name: str
    at_once: int
    config: dict[str, Any]
    steps_ahead: int = 1
    is_warm: bool = False
    is_split: bool = False
    num_neighbours: int = 0


def make_requests(count: int, vocab_size: int, num_tokens: int, seed: int = 3) -> list[Request]:
    """Seeded prompts of lengths around the borders of blocks, splits and tiles, and all kinds of sampling."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
        tokens = torch.randint(3, vocab_size - 300 if vocab_size > 1000 else vocab_size, (length,), generator=generator)
        sampling = SamplingParams(
            max_tokens=num_tokens,
            seed=index,
            ignore_eos=True,
            **SAMPLING[(index // len(PROMPT_LENGTHS)) % len(SAMPLING)],
        )
        made.append(Request(request_id=f"e{index}", token_ids=tuple(tokens.tolist()), sampling=sampling))
    return made


def make_neighbours(count: int, vocab_size: int, num_tokens: int) -> list[Request]:
    """Short prompts, long answers: they are there while others are computed."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index in range(count):
        tokens = torch.randint(3, min(vocab_size, 1000), (1 + index % NEIGHBOUR_PROMPT,), generator=generator)
        sampling = SamplingParams(max_tokens=num_tokens, seed=index, ignore_eos=True, **SAMPLING[index % 4])
        made.append(Request(request_id=f"n{index}", token_ids=tuple(tokens.tolist()), sampling=sampling))
    return made


class Exactness:
    """Runs cells over one loaded model and collects answers."""

    def __init__(self, model: Any, ops: CudaOps, requests: Sequence[Request], **config: Any) -> None:
        self._model, self._ops, self._requests, self._config = model, ops, requests, config
        self._longest_key = torch.empty(0, dtype=torch.int64, device=ops.device)

    def run(self, cell: Cell) -> dict[str, Answer]:
        engine = self._engine(DecodePolicy(), cell)
        source = self._engine(PrefillPolicy(), cell) if cell.is_split else None
        answers: dict[str, Answer] = {}
        most_rows = 0
        for _ in range(1 + cell.is_warm):
            answers = {request.request_id: Answer() for request in self._requests}
            for start in range(0, len(self._requests), cell.at_once):
                group = self._requests[start : start + cell.at_once]
                for neighbour in make_neighbours(cell.num_neighbours, self._model.config.vocab_size, NEIGHBOUR_TOKENS):
                    engine.add_request(neighbour)
                if source is None:
                    for request in group:
                        engine.add_request(request)
                else:
                    self._hand_over(source, engine, group, answers)
                most_rows = max(most_rows, self._finish(engine, answers))
        _check_graphs(cell, source or engine)
        if cell.num_neighbours:
            assert most_rows == cell.at_once + cell.num_neighbours, f"at most {most_rows} rows were drawn together"
        for request in self._requests:  # rows of drafts that lay behind the end count for nothing
            answer = answers[request.request_id]
            end = len(request.token_ids) + len(answer.tokens)
            answer.logits = {position: digest for position, digest in answer.logits.items() if position < end}
        for each in (engine, source):
            if each is not None:
                each.blocks.check_integrity()
                assert each.blocks.num_free == each.num_blocks, "blocks leaked"
        return answers

    def _engine(self, policy: Any, cell: Cell) -> Engine:
        settings = {"device": str(self._ops.device), **self._config, **cell.config}
        return Engine(
            self._model, msgspec.convert(settings, EngineConfig), self._ops, policy, steps_ahead=cell.steps_ahead
        )

    def _finish(self, engine: Engine, answers: dict[str, Answer]) -> int:
        """To the end of all requests. `most_rows` of the watch."""
        with self._watching(engine, answers) as watch, self._watching_kv(engine, answers):
            while engine.has_work():
                for event in engine.step():
                    assert isinstance(event, TokenChunk)
                    take(answers, event)
        return watch.most_rows

    @contextmanager
    def _watching_kv(self, engine: Engine, answers: dict[str, Answer]) -> Iterator[None]:
        """The KV is looked at when a sequence that is complete gives its blocks back; its last token has none."""
        scheduler = engine.scheduler
        plain = scheduler.release_blocks

        def release_blocks(sequence: EngineSequence) -> None:
            request = sequence.request
            is_complete = sequence.num_output_tokens == request.sampling.max_tokens
            if sequence.table is not None and is_complete and request.request_id in answers:
                answers[request.request_id].kv = self._kv_digest(engine, sequence, len(sequence.token_ids) - 1)
            plain(sequence)

        scheduler.release_blocks = release_blocks  # type: ignore[method-assign]
        try:
            yield
        finally:
            del scheduler.release_blocks

    def _hand_over(self, source: Engine, target: Engine, group: Sequence[Request], answers: dict[str, Answer]) -> None:
        """What the connector does, with a copy on the device for the transport."""
        for request in group:
            source.add_request(request)
        with self._watching(source, answers):
            while source.has_work():
                for event in source.step():
                    if not isinstance(event, PromptFinished):
                        continue
                    answers[event.chunk.request_id].logprobs.extend(event.prompt_logprobs)
                    take(answers, event.chunk)
                    assert event.lease is not None
                    request = next(r for r in group if r.request_id == event.chunk.request_id)
                    continued = msgspec.structs.replace(
                        request,
                        token_ids=(*request.token_ids, *event.chunk.token_ids),
                        num_prompt_tokens=len(request.token_ids),
                    )
                    reservation = target.reserve_blocks(continued, event.lease.num_tokens)
                    assert reservation is not None
                    shared = reservation.num_shared_blocks
                    target.blocks.start_loading(reservation)
                    device = self._ops.device
                    theirs = torch.tensor(event.lease.block_ids[shared:], dtype=torch.int64, device=device)
                    ours = torch.tensor(list(reservation.block_ids[shared:]), dtype=torch.int64, device=device)
                    target.kv_cache.kv_NL2HSD[ours] = source.kv_cache.kv_NL2HSD[theirs]
                    source.release(event.lease)
                    target.add_loaded_request(continued, reservation)

    def _watching(self, engine: Engine, answers: dict[str, Answer]) -> LogitsWatch:
        runner = engine._runner
        assert isinstance(runner, GpuModelRunner)
        return LogitsWatch(runner, answers, self._key)

    def _kv_digest(self, engine: Engine, sequence: EngineSequence, num_tokens: int) -> int:
        assert sequence.table is not None
        blocks = torch.tensor(list(sequence.table.block_ids), device=self._ops.device)
        kv = engine.kv_cache.kv_NL2HSD[blocks].permute(0, 4, 1, 2, 3, 5)
        rows = kv.reshape(-1, *kv.shape[2:])[:num_tokens].contiguous().view(torch.int16).flatten().long()
        return int((rows * self._key(len(rows))).sum())

    def _key(self, count: int) -> torch.Tensor:
        """Odd 64-bit factors: a digest that knows the place of every value. The first ones of a longer key are
        those of a shorter one."""
        if len(self._longest_key) < count:
            mixed = (torch.arange(count, device=self._ops.device) + 1) * _as_int64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # as splitmix64 does
                mixed = (mixed ^ (mixed >> shift)) * _as_int64(factor)
            self._longest_key = (mixed ^ (mixed >> 31)) | 1
        return self._longest_key[:count]


def _as_int64(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _check_graphs(cell: Cell, engine: Engine) -> None:
    """A cell of graphs that no step with prompts replayed would prove nothing."""
    if cell.config.get("graph_prompt_rows"):
        runner = engine._runner
        assert isinstance(runner, GpuModelRunner)
        assert runner.prompt_graphs is not None
        assert runner.prompt_graphs.num_replays > 0, "no step with prompts was a graph"


def standard_cells(batches: Iterable[int], chunks: Iterable[int]) -> Iterator[Cell]:
    """The reference is each request alone, eagerly, its prompt in one piece."""
    for batch in batches:
        yield Cell(f"batch {batch}, graphs", batch, {})
    for chunk in chunks:
        yield Cell(f"chunks of {chunk}", 24, {"max_batched_tokens": chunk, "max_num_sequences": 24})
    largest = max(batches)
    yield Cell("prompts in graphs", largest, {"max_batched_tokens": 512, "graph_prompt_rows": 512})
    limits = {"max_batched_tokens": 97, "max_num_sequences": 24, "graph_prompt_rows": 97}
    yield Cell("prompts in graphs, chunks of 97", 24, limits, is_warm=True)
    yield Cell("eager", largest, {"cuda_graphs": False})
    yield Cell("not a step ahead", largest, {}, steps_ahead=0)
    yield Cell("warm cache", largest, {"enable_prefix_caching": True}, is_warm=True)
    yield Cell("split", largest, {"enable_prefix_caching": False}, is_split=True)
    yield Cell("split, warm cache", largest, {"enable_prefix_caching": True}, is_warm=True, is_split=True)


def crowded_cells(at_once: int, batches: Sequence[int], config: dict[str, Any]) -> Iterator[Cell]:
    """The compared requests among as many others as make up each batch; the largest also eagerly."""
    for batch in batches:
        yield Cell(f"among {batch}, graphs", at_once, config, num_neighbours=batch - at_once)
    largest = max(batches)
    eager = {**config, "cuda_graphs": False}
    yield Cell(f"among {largest}, eager", at_once, eager, num_neighbours=largest - at_once)


REFERENCE = Cell("each alone", 1, {"cuda_graphs": False, "enable_prefix_caching": False}, steps_ahead=0)


def compare(lab: Exactness, cells: Iterable[Cell], deadline_s: float = math.inf) -> tuple[int, list[str]]:
    """(cells compared, what differs). No cell is begun after `deadline_s` (of time.monotonic())."""
    started_s = time.monotonic()
    expected = lab.run(REFERENCE)
    _check_revealing(expected)
    print(f"{REFERENCE.name}: {time.monotonic() - started_s:.1f} s", flush=True)
    mismatches: list[str] = []
    count = 0
    for cell in cells:
        if time.monotonic() > deadline_s:
            print(f"no time left for {cell.name}", flush=True)
            continue
        count += 1
        started_s = time.monotonic()
        found = [
            f"{cell.name}: {request_id}: {', '.join(different)}"
            for request_id, answer in lab.run(cell).items()
            if (different := answer.differences(expected[request_id]))
        ]
        mismatches += found
        verdict = f"{len(found)} requests differ" if found else "equal"
        print(f"{cell.name}: {verdict}, {time.monotonic() - started_s:.1f} s", flush=True)
        gc.collect()  # a pool that waits for the collector would leave no room for the next one
        torch.cuda.empty_cache()
    return count, mismatches


def _check_revealing(answers: dict[str, Answer]) -> None:
    """Data that could not reveal a difference would prove nothing."""
    assert all(answer.tokens and answer.logits for answer in answers.values())
    many = [answer for answer in answers.values() if len(answer.tokens) > 4]
    assert len({tuple(answer.tokens) for answer in many}) > len(many) // 2
    assert all(answer.kv is not None for answer in answers.values())
