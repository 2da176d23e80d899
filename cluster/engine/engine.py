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
from typing import TYPE_CHECKING, Any, cast

import torch

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_holders import Lease, Reservation
from cluster.engine.block_manager import BlockManager
from cluster.engine.commit import Committer
from cluster.engine.config import EngineConfig
from cluster.engine.events import EngineEvent
from cluster.engine.kernels.ops import Ops
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.model_runner import LaunchedStep, Model, ModelRunner, Runner
from cluster.engine.pool_size import choose_num_blocks
from cluster.engine.request_check import check_request
from cluster.engine.scheduler import Policy, Scheduler
from cluster.engine.sequence import Sequence, SequenceKey, make_sequence
from cluster.engine.speculation.setup import make_speculator
from cluster.engine.speculation.speculator import SpeculationCounts, Speculator
from cluster.engine.timings import EngineTimings
from cluster.errors import DeadlineExceeded, InvalidRequest, StartupError
from cluster.types import FinishReason, Request, WorkerLoad

if TYPE_CHECKING:
    from cluster.engine.gpu.model import GpuModel
    from cluster.engine.kernels.cuda_ops import CudaOps


class Engine:
    """Owns the KV pool, its books (`blocks`) and every sequence from `add_request` to its terminal event.

    `steps_ahead`: how many steps may be launched before their predecessor's tokens are known. None: 0 on
    a CPU, which computes in `launch`; 1 on a GPU, behind which it hides the scheduling. `draft_model`: guesses
    tokens if `config.speculation` says so; it has the target's vocabulary.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        ops: Ops,
        policy: Policy,
        *,
        draft_model: Model | None = None,
        steps_ahead: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.vocab_size = model.config.vocab_size
        self.max_model_len = _max_model_len(model, config)
        limits = config.limits
        self.layout = model.kv_layout(limits.block_size)
        draft_layout = None if draft_model is None else draft_model.kv_layout(limits.block_size)
        self.kv_cache, self._runner = _start(model, ops, self.layout, config, self.max_model_len, draft_layout)
        self.num_blocks = self.kv_cache.num_blocks
        self.blocks = BlockManager(
            self.num_blocks, limits.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            policy,
            max_num_sequences=limits.max_num_sequences,
            max_batched_tokens=limits.max_batched_tokens,
            speculator=None if policy.hands_over else self._make_speculator(ops, draft_model),
        )
        self.is_blocked = False  # the last step found nothing it could run: all waits for blocks
        self.is_computing = False  # the last step left one that is still running
        self._eos_token_ids = model.config.eos_token_ids
        self._clock = clock
        self._steps_ahead = int(config.device != "cpu") if steps_ahead is None else steps_ahead
        self._launched: deque[LaunchedStep] = deque()
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._deadlines: list[tuple[float, SequenceKey]] = []  # a heap; ended requests drop out when due
        self.timings = EngineTimings()
        self._committer = Committer(self.scheduler, self._sequences, self.timings, hands_over=policy.hands_over)

    def _make_speculator(self, ops: Ops, draft_model: Model | None) -> Speculator | None:
        """A draft model gets a pool that mirrors the target's."""
        draft_runner, max_position = None, self.max_model_len
        if draft_model is not None:
            draft_runner = _start_draft(draft_model, ops, self.config, self.num_blocks, self.max_model_len)
            max_position = min(max_position, draft_model.config.max_position)
        return make_speculator(
            self.config.speculation,
            self.blocks,
            draft_runner,
            max_position=max_position,
            max_batched_tokens=self.config.limits.max_batched_tokens,
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
        chain = BlockHashChain(array("i", request.token_ids), self.layout.block_size, request.cache_salt)
        reservation = self.blocks.reserve(chain, num_tokens, keep_free=len(self.scheduler.running))
        if reservation is not None:
            self.scheduler.count_cache_query(num_tokens, reservation.num_cached_tokens)
        return reservation

    def has_waited_since_before(self, moment: float) -> bool:
        """Whether the first that waits for blocks has done so since before a moment of the clock."""
        waiting = self.scheduler.waiting
        return bool(waiting) and waiting[0].queued_at < moment

    def add_loaded_request(self, request: Request, reservation: Reservation) -> None:
        """Take a request whose KV was pulled into `reservation` and verified; generation goes on at the
        first token without KV. Takes over the reservation. Raises as `check` does; then the reservation
        is still the caller's."""
        sequence = self._make_sequence(request, is_loaded=True)
        sequence.table = self.blocks.commit(reservation, sequence.chain)
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = reservation.num_tokens
        self.timings.on_loaded(sequence, self._clock())
        self.scheduler.add_running(sequence)

    def cancel(self, request_id: str, attempt: int, *, is_served: bool = False) -> None:
        """End a request; the next `step` reports it as CANCELLED. An unknown one is ignored. `is_served`: whoever
        wanted it has all of it, so its time counts like that of one that ends by itself."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is not None:
            if is_served and sequence.first_token_at is not None:
                self.timings.on_end(sequence, self._clock(), hands_over=False)
            self._committer.end(sequence, FinishReason.CANCELLED)

    def release(self, lease: Lease) -> None:
        """The peer has read the blocks of a PromptFinished event, or its lease has expired."""
        self.blocks.release(lease)

    # ---- steps

    def has_work(self) -> bool:
        """True while `step` has something to compute or to report."""
        return bool(self._sequences or self._launched or self._committer.has_events)

    def step(self, *, wait: bool = True) -> list[EngineEvent]:
        """Launch a step and report what a launched one has brought, in order. See `is_blocked` for when to
        wait. `wait` False: a step that is still running is left for a later call (`is_computing`)."""
        self._expire()
        batch = None
        self.is_computing = False
        while self._launched and self.scheduler.is_held_up and self._collect_oldest(wait=wait):
            pass
        if not self.is_computing and len(self._launched) <= self._steps_ahead:
            batch = self.scheduler.schedule()
            self._report_admitted()
        if batch is not None:
            self.timings.on_step(batch)
            self._launched.append(self._runner.launch(batch))
        if self._launched and (batch is None or len(self._launched) > self._steps_ahead):
            self._collect_oldest(wait=wait)
        self.is_blocked = batch is None and not self._launched and bool(self._sequences)
        return self._committer.drain()

    def _collect_oldest(self, *, wait: bool) -> bool:
        """False: it is still running and is not waited for."""
        self.is_computing = not wait and not self._runner.is_done(self._launched[0])
        if not self.is_computing:
            launched = self._launched.popleft()
            result = self._runner.collect(launched)
            self._committer.commit(launched.batch, result, self._clock())
        return not self.is_computing

    def _report_admitted(self) -> None:
        for sequence in self.scheduler.drain_admitted():
            self.timings.on_admitted(sequence, self._clock())
            self._committer.report_started(sequence)

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
            block_size=self.layout.block_size,
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


def _start(
    model: Model,
    ops: Ops,
    layout: KVLayout,
    config: EngineConfig,
    max_model_len: int,
    draft_layout: KVLayout | None,
) -> tuple[KVCache, Runner[Any]]:
    """The KV pool and what runs steps over it. A draft model's pool, as many blocks, is left room for."""
    device = torch.device(config.device)
    if device.type == "cuda":
        from cluster.engine.gpu.start import start_gpu  # needs Triton

        return start_gpu(cast("GpuModel", model), cast("CudaOps", ops), layout, config, max_model_len, draft_layout)
    kv_cache = KVCache(layout, choose_num_blocks(layout, config, max_model_len, draft_layout), device)
    return kv_cache, _host_runner(model, ops, kv_cache, config, max_model_len)


def _start_draft(model: Model, ops: Ops, config: EngineConfig, num_blocks: int, max_model_len: int) -> Runner[Any]:
    """What runs the draft model, over a pool of its own."""
    layout, device = model.kv_layout(config.limits.block_size), torch.device(config.device)
    if device.type == "cuda":
        from cluster.engine.gpu.start import start_draft  # needs Triton

        return start_draft(cast("GpuModel", model), cast("CudaOps", ops), layout, config, num_blocks, max_model_len)
    return _host_runner(model, ops, KVCache(layout, num_blocks, device), config, max_model_len)


def _host_runner(model: Model, ops: Ops, kv_cache: KVCache, config: EngineConfig, max_model_len: int) -> ModelRunner:
    return ModelRunner(
        model,
        ops,
        kv_cache,
        device=torch.device(config.device),
        max_batched_tokens=config.limits.max_batched_tokens,
        max_num_sequences=config.limits.max_num_sequences,
        max_blocks_per_sequence=-(-max_model_len // kv_cache.layout.block_size),
    )
