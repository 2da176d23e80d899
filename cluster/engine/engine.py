"""One model, one KV pool, many sequences: `step()` is schedule, run, commit.

No network, no hand-over, no role: what differs between prefill and decode is the policy it is given.
One thread calls everything here.
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections import deque
from collections.abc import Callable

import torch

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_holders import Lease, Reservation
from cluster.engine.block_manager import BlockManager
from cluster.engine.commit import Committer
from cluster.engine.config import EngineConfig
from cluster.engine.events import EngineEvent
from cluster.engine.kernels.ops import Ops
from cluster.engine.kv_cache import KVCache
from cluster.engine.model_runner import LaunchedStep, Model, ModelRunner
from cluster.engine.pool_size import choose_num_blocks
from cluster.engine.request_check import check_request
from cluster.engine.scheduler import Policy, Scheduler
from cluster.engine.sequence import Sequence, SequenceKey, make_sequence
from cluster.engine.speculation.setup import make_speculator
from cluster.engine.speculation.speculator import SpeculationCounts, Speculator
from cluster.engine.timings import EngineTimings
from cluster.errors import DeadlineExceeded, InvalidRequest, StartupError
from cluster.types import FinishReason, Request, WorkerLoad


class Engine:
    """Owns the KV pool, its books (`blocks`) and every sequence from `add_request` to its terminal event.

    `steps_ahead`: how many steps may be launched before their predecessor's tokens are known. 0 on a
    CPU, which computes in `launch`; 1 hides the scheduling behind a GPU. `draft_model`: guesses tokens if
    `config.speculation` says so; it has the target's vocabulary.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        ops: Ops,
        policy: Policy,
        *,
        draft_model: Model | None = None,
        steps_ahead: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.vocab_size = model.config.vocab_size
        self.max_model_len = _max_model_len(model, config)
        self.layout = model.kv_layout(config.block_size)
        draft_layout = None if draft_model is None else draft_model.kv_layout(config.block_size)
        self.num_blocks = choose_num_blocks(self.layout, config, self.max_model_len, draft_layout)
        self.kv_cache = KVCache(self.layout, self.num_blocks, torch.device(config.device))
        self.blocks = BlockManager(
            self.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            policy,
            max_num_sequences=config.max_num_sequences,
            max_batched_tokens=config.max_batched_tokens,
            speculator=None if policy.hands_over else self._make_speculator(ops, draft_model),
        )
        self.is_blocked = False  # the last step found nothing it could run: all waits for blocks
        self._runner = self._make_runner(model, ops, self.kv_cache)
        self._eos_token_ids = model.config.eos_token_ids
        self._clock = clock
        self._steps_ahead = steps_ahead
        self._launched: deque[LaunchedStep] = deque()
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._deadlines: list[tuple[float, SequenceKey]] = []  # a heap; ended requests drop out when due
        self.timings = EngineTimings()
        self._committer = Committer(self.scheduler, self._sequences, self.timings, hands_over=policy.hands_over)

    def _make_runner(self, model: Model, ops: Ops, kv_cache: KVCache) -> ModelRunner:
        return ModelRunner(
            model,
            ops,
            kv_cache,
            device=torch.device(self.config.device),
            max_batched_tokens=self.config.max_batched_tokens,
            max_num_sequences=self.config.max_num_sequences,
            max_blocks_per_sequence=self.blocks.num_blocks_for(self.max_model_len),
        )

    def _make_speculator(self, ops: Ops, draft_model: Model | None) -> Speculator | None:
        """A draft model gets a pool that mirrors the target's."""
        draft_runner, max_position = None, self.max_model_len
        if draft_model is not None:
            draft_layout = draft_model.kv_layout(self.config.block_size)
            draft_cache = KVCache(draft_layout, self.num_blocks, torch.device(self.config.device))
            draft_runner = self._make_runner(draft_model, ops, draft_cache)
            max_position = min(max_position, draft_model.config.max_position)
        return make_speculator(
            self.config.speculation,
            self.blocks,
            draft_runner,
            max_position=max_position,
            max_batched_tokens=self.config.max_batched_tokens,
        )

    # ---- requests

    def check(self, request: Request) -> None:
        """InvalidRequest or ContextTooLong if this engine can never run the request (`request_check`)."""
        check_request(request, vocab_size=self.vocab_size, max_model_len=self.max_model_len)

    def add_request(self, request: Request) -> None:
        """Take a request whose prompt is computed here. From now on `step` reports it, up to exactly one
        terminal event. Raises as `check` does; nothing was taken then."""
        sequence = self._make_sequence(request, is_loaded=False)
        self.scheduler.add(sequence)

    def reserve_blocks(self, request: Request, num_tokens: int) -> Reservation | None:
        """Blocks into which to pull the KV of the request's first `num_tokens` tokens, less what the
        prefix cache has. None: too few are free now. The caller owns the result until it gives it to
        `add_loaded_request` or `blocks.abort`. Raises as `check` does."""
        self.check(request)
        if not 0 < num_tokens < len(request.token_ids):
            raise InvalidRequest(
                f"KV of {num_tokens} tokens for a sequence of {len(request.token_ids)}: the newest is computed here",
                param="kv",
            )
        chain = BlockHashChain(array("i", request.token_ids), self.config.block_size, request.cache_salt)
        reservation = self.blocks.reserve(chain, num_tokens, keep_free=len(self.scheduler.running))
        if reservation is not None:
            self.scheduler.count_cache_query(num_tokens, reservation.num_cached_tokens)
        return reservation

    def add_loaded_request(self, request: Request, reservation: Reservation) -> None:
        """Take a request whose KV was pulled into `reservation` and verified; generation goes on at the
        first token without KV. Takes over the reservation. Raises as `check` does; then the reservation
        is still the caller's."""
        sequence = self._make_sequence(request, is_loaded=True)
        sequence.table = self.blocks.commit(reservation, sequence.chain)
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = reservation.num_tokens
        self.timings.on_loaded(sequence, self._clock())
        self.scheduler.add_running(sequence)

    def cancel(self, request_id: str, attempt: int) -> None:
        """End a request; the next `step` reports it as CANCELLED. An unknown one is ignored."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is not None:
            self._committer.end(sequence, FinishReason.CANCELLED)

    def release(self, lease: Lease) -> None:
        """The peer has read the blocks of a PromptFinished event, or its lease has expired."""
        self.blocks.release(lease)

    # ---- steps

    def has_work(self) -> bool:
        """True while `step` has something to compute or to report."""
        return bool(self._sequences or self._launched or self._committer.has_events)

    def step(self) -> list[EngineEvent]:
        """Compute one step and report what happened, in order. See `is_blocked` for when to wait."""
        self._expire()
        while self._launched and self.scheduler.is_held_up:
            self._collect_oldest()
        batch = self.scheduler.schedule()
        for sequence in self.scheduler.drain_admitted():
            self.timings.on_admitted(sequence, self._clock())
            self._committer.report_started(sequence)
        if batch is not None:
            self.timings.on_step(batch)
            self._launched.append(self._runner.launch(batch))
        if self._launched and (batch is None or len(self._launched) > self._steps_ahead):
            self._collect_oldest()
        self.is_blocked = batch is None and not self._launched and bool(self._sequences)
        return self._committer.drain()

    def _collect_oldest(self) -> None:
        launched = self._launched.popleft()
        result = self._runner.collect(launched)
        self._committer.commit(launched.batch, result, self._clock())

    def load(self) -> WorkerLoad:
        """A gauge reading. The transfer counters are the worker's to fill in."""
        speculator = self.scheduler.speculator
        drafts = SpeculationCounts([]) if speculator is None else speculator.counts
        return WorkerLoad(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_free_blocks=self.blocks.num_free,
            num_blocks=self.num_blocks,
            num_leased_blocks=self.blocks.num_pinned,
            num_draining_blocks=self.blocks.num_draining,
            prompt_tokens=self._committer.num_prompt_tokens,
            generation_tokens=self._committer.num_generated_tokens,
            cached_tokens=self.scheduler.num_cached_tokens,
            cache_queries=self.scheduler.num_cache_queries,
            preemptions=self.scheduler.num_preemptions,
            spec_drafts=drafts.num_drafts,
            spec_draft_tokens=drafts.num_draft_tokens,
            spec_accepted_tokens=drafts.num_accepted_tokens,
            spec_accepted_per_position=tuple(drafts.accepted_per_position),
        )

    def _make_sequence(self, request: Request, *, is_loaded: bool) -> Sequence:
        self.check(request)
        if (request.request_id, request.attempt) in self._sequences:
            raise InvalidRequest(f"request {request.request_id!r} attempt {request.attempt} is running already")
        deadline = None if request.deadline_s is None else self._clock() + request.deadline_s
        sequence = make_sequence(
            request,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self._eos_token_ids,
            is_loaded=is_loaded,
        )
        sequence.queued_at = self._clock()
        self._sequences[sequence.key] = sequence
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, sequence.key))
        return sequence

    def _expire(self) -> None:
        """End what is past its deadline, running or waiting, whether or not new requests arrive."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, key = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(key)
            if sequence is not None:
                deadline_s = sequence.request.deadline_s
                error = DeadlineExceeded(f"the request was not finished within its deadline of {deadline_s} s")
                self._committer.end(sequence, FinishReason.ERROR, error)


def _max_model_len(model: Model, config: EngineConfig) -> int:
    """The context this engine serves: the model's, or a shorter one."""
    longest = model.config.max_position
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise StartupError(
            f"engine.max_model_len is {config.max_model_len}, the model's context is {longest}: lower it"
        )
    return config.max_model_len
