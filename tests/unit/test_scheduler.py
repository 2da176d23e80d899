"""Queues and policies, without a model: what is scheduled, who waits, who is preempted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.batch import Batch
from cluster.engine.block_manager import BlockManager
from cluster.engine.scheduler import Policy, Scheduler
from cluster.engine.sequence import Sequence, make_sequence
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.unit.engine_fakes import make_request

SIZE = 4


@dataclass
class Harness:
    """Runs steps as an engine without a model would: every drawn token is 0."""

    policy: Policy
    num_blocks: int = 64
    max_num_sequences: int = 8
    max_batched_tokens: int = 32
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, SIZE, enable_prefix_caching=False)
        self.scheduler = Scheduler(
            self.blocks,
            self.policy,
            max_num_sequences=self.max_num_sequences,
            max_batched_tokens=self.max_batched_tokens,
        )

    def add(self, name: str, num_prompt: int, max_tokens: int = 4) -> Sequence:
        request = make_request(name, tuple(range(num_prompt)), max_tokens=max_tokens)
        sequence = make_sequence(request, block_size=SIZE, max_model_len=10_000, eos_token_ids=(), is_loaded=False)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[str, int]:
        """Rows by request id."""
        batch = self.scheduler.schedule()
        if batch is None:
            return {}
        self.commit(batch)
        return rows_of(batch)

    def commit(self, batch: Batch) -> None:
        for entry in batch.scheduled:
            sequence = entry.sequence
            sequence.num_in_flight -= 1
            sequence.num_pending_tokens -= entry.samples
            sequence.num_computed_tokens = entry.start + entry.num_tokens
            if entry.samples:
                sequence.token_ids.append(0)
                if self.policy.hands_over or len(sequence.token_ids) >= sequence.max_total_tokens:
                    self.finished.append(sequence.request.request_id)
                    self.scheduler.leave(sequence)
        self.blocks.check_integrity()

    def run(self, max_steps: int = 10_000) -> int:
        for step in range(max_steps):
            if not self.scheduler.running and not self.scheduler.waiting:
                return step
            assert self.step(), "nothing could be scheduled"
        raise AssertionError(f"not finished after {max_steps} steps")


def rows_of(batch: Batch) -> dict[str, int]:
    return {entry.sequence.request.request_id: entry.num_tokens for entry in batch.scheduled}


@pytest.mark.parametrize("policy", [PrefillPolicy(), DecodePolicy()])
def test_a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_keeps_half(policy: Policy) -> None:
    harness = Harness(policy, num_blocks=400)
    harness.add("long", 1000, max_tokens=1)
    assert harness.step() == {"long": 32}
    harness.add("short", 10, max_tokens=1)
    assert harness.step() == {"long": 22, "short": 10}
    num_steps = 0
    while "long" not in harness.finished:  # a stream of short ones cannot hold the long one back
        harness.add(f"short{num_steps}", 30, max_tokens=1)
        harness.step()
        num_steps += 1
    assert num_steps <= 1000 // 16
    assert "short3" in harness.finished


def test_prompts_of_one_size_are_computed_in_order_of_arrival() -> None:
    harness = Harness(PrefillPolicy(), max_batched_tokens=16)
    for name in "abcdef":
        harness.add(name, 20)
    harness.run()
    assert harness.finished == list("abcdef")


def test_decode_rows_come_first_and_prompts_take_the_rest() -> None:
    harness = Harness(DecodePolicy(), max_batched_tokens=8)
    for name in "abc":
        harness.add(name, 2, max_tokens=20)
    harness.step()
    harness.add("prompt", 40)
    assert harness.step() == {"a": 1, "b": 1, "c": 1, "prompt": 5}


def test_when_blocks_run_out_the_newest_is_preempted_and_all_finish_sglang_6857() -> None:
    harness = Harness(DecodePolicy(), num_blocks=10)
    for name in "abcd":
        harness.add(name, 4, max_tokens=30)
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    assert harness.finished == list("abcd")
    assert harness.blocks.num_free == 10


def test_preempted_sequences_come_back_before_those_that_never_ran_in_their_old_order() -> None:
    harness = Harness(DecodePolicy(), num_blocks=8)
    first, second, third = (harness.add(name, 4, max_tokens=20) for name in "abc")
    harness.step()
    harness.add("later", 4)
    for victim in (third, second):
        assert harness.scheduler.preempt_newest()
        assert victim.table is None
        assert (victim.num_computed_tokens, victim.num_scheduled_tokens) == (0, 0)
    assert [each.request.request_id for each in harness.scheduler.waiting] == ["b", "c", "later"]
    assert harness.scheduler.running == [first]


def test_a_sequence_in_a_launched_step_is_not_preempted_but_sits_out_the_next() -> None:
    harness = Harness(DecodePolicy(), num_blocks=5)
    for name in "ab":
        harness.add(name, 7, max_tokens=20)
    harness.step()
    launched = harness.scheduler.schedule()
    assert launched is not None
    assert rows_of(launched) == {"a": 1, "b": 1}
    ahead = harness.scheduler.schedule()  # a takes the last block; b is on the device and keeps its own
    assert ahead is not None
    assert rows_of(ahead) == {"a": 1}
    assert harness.scheduler.num_preemptions == 0
    harness.commit(launched)
    third = harness.scheduler.schedule()
    assert third is not None
    assert rows_of(third) == {"a": 1}
    assert harness.scheduler.num_preemptions == 1
    assert [each.request.request_id for each in harness.scheduler.waiting] == ["b"]


def test_a_step_ahead_reads_the_pending_token() -> None:
    harness = Harness(DecodePolicy())
    harness.add("a", 5, max_tokens=3)
    batches = []
    for _ in range(3):
        batch = harness.scheduler.schedule()
        assert batch is not None
        batches.append(batch.scheduled[0])
    assert harness.scheduler.schedule() is None  # the third token is the last
    assert [(each.start, each.num_tokens, each.reads_pending_token) for each in batches] == [
        (0, 5, False),
        (5, 1, True),
        (6, 1, True),
    ]


def test_a_sequence_whose_draw_needs_its_history_is_not_run_ahead() -> None:
    harness = Harness(DecodePolicy())
    request = make_request("a", (1, 2, 3), repetition_penalty=1.5)
    harness.scheduler.add(make_sequence(request, block_size=SIZE, max_model_len=100, eos_token_ids=(), is_loaded=False))
    launched = harness.scheduler.schedule()
    assert launched is not None
    assert harness.scheduler.schedule() is None
    harness.commit(launched)
    assert harness.step() == {"a": 1}


def test_a_prefill_engine_never_computes_past_the_first_token() -> None:
    harness = Harness(PrefillPolicy())
    harness.add("a", 5)
    assert harness.scheduler.schedule() is not None
    assert harness.scheduler.schedule() is None


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    harness = Harness(DecodePolicy(), num_blocks=8)
    for name in "abc":
        harness.add(name, 4, max_tokens=5)
    harness.step()
    harness.add("d", 4)
    assert harness.step() == {"a": 1, "b": 1, "c": 1}
    assert harness.blocks.num_free == 2  # enough for d alone
    harness.run()
    assert harness.scheduler.num_preemptions == 0


def test_a_waiting_sequence_can_leave() -> None:
    harness = Harness(PrefillPolicy(), max_num_sequences=1)
    harness.add("a", 100)
    waiting = harness.add("b", 4)
    harness.step()
    harness.scheduler.leave(waiting)
    assert not harness.scheduler.waiting


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12),
    num_blocks=st.integers(11, 30),
    budget=st.integers(4, 40),
    is_prefill=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_everything_finishes_within_the_limits(
    lengths: list[tuple[int, int]], num_blocks: int, budget: int, is_prefill: bool
) -> None:
    harness = Harness(
        PrefillPolicy() if is_prefill else DecodePolicy(),
        num_blocks=num_blocks,
        max_num_sequences=4,
        max_batched_tokens=budget,
    )
    for index, (num_prompt, max_tokens) in enumerate(lengths):
        harness.add(f"r{index}", num_prompt, max_tokens)
    harness.run(max_steps=2000)
    assert sorted(harness.finished) == sorted(f"r{index}" for index in range(len(lengths)))
    assert harness.blocks.num_free == num_blocks
