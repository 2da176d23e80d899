"""A cohort is a shortcut: with and without, every step has the same rows, blocks and events."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cluster.engine.batch import Batch, DecodedTokens, StepResult
from cluster.engine.block_manager import BlockManager
from cluster.engine.cohort import Cohort
from cluster.engine.engine import Engine
from cluster.engine.gpu.block_rows import BlockRows
from cluster.engine.gpu.shapes import StepShape
from cluster.engine.gpu.step_words import StepBounds, StepWords
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence, make_sequence
from cluster.types import FinishReason, Request, TokenChunk
from decode.policy import DecodePolicy
from tests.unit.engine_fakes import (
    BLOCK_SIZE,
    NAN_TOKEN,
    Outcome,
    collect,
    make_engine,
    make_request,
    prompt_of,
    run_all,
)

SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 7, "logprobs": 2, "ignore_eos": True},
    {"temperature": 0.7, "top_k": 9, "seed": 3, "min_tokens": 5, "stop_token_ids": (11, 12, 13)},
    {"ignore_eos": True, "logit_bias": ((3, 2.0),)},
    {"prompt_logprobs": 1, "ignore_eos": True},
)


def arrivals(seed: int, count: int) -> Iterator[tuple[int, Request]]:
    """(step, request), in order of the steps."""
    source, step = random.Random(seed), 0
    for index in range(count):
        step += source.choice((0, 0, 3, 9))
        prompt = prompt_of(source.randrange(1, 3 * BLOCK_SIZE), index)
        sampling = SAMPLING[source.randrange(len(SAMPLING))]
        yield step, make_request(f"r{index}", prompt, max_tokens=source.randrange(1, 75), **sampling)


def history(engine: Engine, seed: int, num_requests: int) -> tuple[list[Any], int]:
    """What happened in each step, and in how many of them a cohort went on."""
    steps: list[Any] = []
    num_continued = 0
    schedule = engine.scheduler.schedule

    def watched() -> Batch | None:
        nonlocal num_continued
        batch = schedule()
        if batch is not None:
            num_continued += batch.age > 0
            entries = [
                (each.sequence.key, each.start, each.num_tokens, each.samples, each.reads_pending_token)
                for each in batch.scheduled
            ]
            tables = [list(each.sequence.table.block_ids) for each in batch.scheduled if each.sequence.table]
            steps.append((batch.step, batch.num_tokens, entries, tables))
        return batch

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    source, waiting = random.Random(seed), list(arrivals(seed, num_requests))
    for step in range(3000):
        while waiting and waiting[0][0] <= step:
            engine.add_request(waiting.pop(0)[1])
        if source.random() < 0.02:
            engine.cancel(f"r{source.randrange(num_requests)}", 0)
        if not waiting and not engine.has_work():
            break
        steps.append(engine.step())
        engine.blocks.check_integrity()
        for sequence in engine.scheduler.running:
            assert sequence.table is not None
            assert sequence.table.num_registered == sequence.num_computed_tokens // BLOCK_SIZE
    assert not engine.has_work()
    assert engine.blocks.num_free == engine.num_blocks
    return steps, num_continued


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_steps_with_and_without(
    steps_ahead: int, num_blocks: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Any], int]:
        engine = make_engine(
            DecodePolicy(), num_blocks=num_blocks, max_model_len=128, max_num_sequences=6, steps_ahead=steps_ahead
        )
        found = history(engine, seed, 16)
        if num_blocks < 20:
            assert engine.load().preemptions > 0
        return found

    steps, num_continued = run()
    monkeypatch.setattr(Scheduler, "_find_cohort", lambda self, scheduled: None)
    expected, never = run()
    assert never == 0
    assert num_continued > 20
    assert steps == expected


class DecodingRunner:
    """Answers a cohort's steps as a GPU's runner does, in columns."""

    def __init__(self, engine: Engine) -> None:
        self._runner: Any = engine._runner
        self.num_columns = self.num_broken = 0

    def launch(self, batch: Batch) -> Any:
        return self._runner.launch(batch)

    def is_done(self, step: Any) -> bool:
        return True

    def collect(self, step: Any) -> StepResult | DecodedTokens:
        result: StepResult = self._runner.collect(step)
        if step.batch.age == 0:
            return result
        drawn = [token for (token,) in result.sampled]
        if any(token.is_nan for token in drawn):
            self.num_broken += 1
            return result
        self.num_columns += 1
        logprobs = [() if token.logprob is None else (token.logprob,) for token in drawn]
        return DecodedTokens([token.token_id for token in drawn], logprobs if any(logprobs) else None)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_events_from_columns(steps_ahead: int, seed: int) -> None:
    def engine() -> Engine:
        return make_engine(DecodePolicy(), num_blocks=64, max_num_sequences=6, steps_ahead=steps_ahead)

    other = engine()
    other._runner = runner = DecodingRunner(other)
    assert history(other, seed, 16) == history(engine(), seed, 16)
    assert runner.num_columns > 20


def test_a_broken_member_ends_alone_and_in_its_place() -> None:
    engine = make_engine(DecodePolicy(), steps_ahead=1)
    engine._runner = runner = DecodingRunner(engine)
    sound = [make_request(name, (token,), ignore_eos=True) for name, token in (("first", 5), ("last", 7))]
    engine.add_request(sound[0])
    engine.add_request(make_request("broken", (6,), ignore_eos=True, logit_bias=((NAN_TOKEN, 100.0),)))
    engine.add_request(sound[1])
    outcomes: dict[str, Outcome] = {}
    while runner.num_broken == 0:
        events = engine.step()
        collect(outcomes, events)
    chunks = [event for event in events if isinstance(event, TokenChunk)]
    assert [(chunk.request_id, chunk.finish_reason) for chunk in chunks] == [
        ("first", None),
        ("broken", FinishReason.ERROR),
        ("last", None),
    ]
    assert outcomes["broken"].token_ids == [NAN_TOKEN]
    while engine.has_work():
        collect(outcomes, engine.step())
    for request in sound:
        alone = make_engine(DecodePolicy())
        alone.add_request(request)
        assert outcomes[request.request_id].token_ids == run_all(alone)[request.request_id].token_ids


def test_what_draws_by_its_history_is_never_in_a_cohort() -> None:
    """Its next row waits for the token before."""
    engine = make_engine(DecodePolicy(), steps_ahead=1)
    engine.add_request(make_request("plain", prompt_of(20), max_tokens=20, ignore_eos=True))
    for _ in range(6):
        engine.step()
    assert engine.scheduler._cohort is not None
    engine.add_request(make_request("by history", prompt_of(20, 1), max_tokens=20, presence_penalty=1.0))
    for _ in range(6):
        engine.step()
        assert engine.scheduler._cohort is None


def test_who_comes_with_blocks_is_in_the_next_step() -> None:
    """Nothing tells the policy of it but the list of what runs."""
    blocks = BlockManager(16, BLOCK_SIZE)
    scheduler = Scheduler(blocks, DecodePolicy(), max_num_sequences=8, max_batched_tokens=64)
    first, second, late = running(blocks, [5, 9, 20])
    for sequence in (first, second):
        scheduler.add_running(sequence)
    ages = []
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        ages.append(batch.age)
    assert ages == [0, 1, 2]
    scheduler.add_running(late)
    batch = scheduler.schedule()
    assert batch is not None
    assert [entry.sequence for entry in batch.scheduled] == [first, second, late]
    assert batch.age == 0


# ---- the words of its steps


def running(blocks: BlockManager, lengths: list[int]) -> tuple[Sequence, ...]:
    made = []
    for index, length in enumerate(lengths):
        request = make_request(f"r{index}", prompt_of(length, index), max_tokens=400)
        sequence = make_sequence(request, block_size=BLOCK_SIZE, max_model_len=900, eos_token_ids=(), is_loaded=False)
        sequence.table = blocks.allocate(sequence.chain, length, 0)
        sequence.num_scheduled_tokens = length - 1
        made.append(sequence)
    return tuple(made)


def laid_out(batch: Batch, bounds: StepBounds, blocks: BlockRows) -> StepWords:
    words = StepWords(np.full(200, 77, np.int32), batch, bounds)
    starts_B = np.asarray([entry.start for entry in batch.scheduled], np.int32)
    row_drawn = {id(entry.sequence): row for row, entry in enumerate(batch.scheduled)}
    words.lay_out(np.ones_like(starts_B), starts_B, (), row_drawn, blocks)
    return words


def packed(words: StepWords) -> list[int]:
    target = np.zeros(1000, np.int32)
    words.copy_to(target)
    return list(map(int, target))


def test_words_that_moved_on_are_those_of_the_step() -> None:
    """Over block boundaries, past the first split of the keys, with padding."""
    lengths = [1, BLOCK_SIZE, BLOCK_SIZE + 1, 470, 31]
    blocks = BlockManager(128, BLOCK_SIZE)
    scheduler = Scheduler(blocks, DecodePolicy(), max_num_sequences=8, max_batched_tokens=64)
    sequences = running(blocks, lengths)
    for sequence in sequences:
        scheduler.add_running(sequence)
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.cohort is not None
    size, longest, num_keys = 8, max(lengths), sum(lengths)
    bounds = StepBounds(StepShape(size, size, size, 1, has_many_splits=False), longest, num_keys)
    rows = BlockRows(8, 64, BLOCK_SIZE)
    words = laid_out(batch, bounds, rows)
    for age in range(1, 80):
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.age == age
        assert words.is_followed_by(batch)
        words.move_on(batch)
        found = words.bounds
        assert (found.longest, found.num_keys) == (longest + age, num_keys + age * len(lengths))
        assert found.shape.has_many_splits == (longest + age > 512)
        expected = laid_out(batch, StepBounds(found.shape, found.longest, found.num_keys), BlockRows(8, 64, BLOCK_SIZE))
        assert packed(words) == packed(expected)
    assert not words.is_followed_by(batch), "a step does not follow itself"


def test_a_row_opens_a_block_where_its_position_is_a_multiple() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    cohort = Cohort(running(blocks, [1, 5, BLOCK_SIZE]), [0, 4, BLOCK_SIZE - 1], BLOCK_SIZE)
    for age in range(3 * BLOCK_SIZE):
        expected = [place for place, start in enumerate(cohort.starts) if (start + age) % BLOCK_SIZE == 0]
        assert list(cohort.opening(age)) == expected
