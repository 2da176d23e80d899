"""Queues, limits and the moves a policy may make with them. Pure Python.

    waiting --admit--> running --leave--> gone
       ^                  |
       +----- preempt ----+          (newest first; its tokens are recomputed later, with the same bits)

`running` is in order of admission and holds every sequence that has blocks. A policy makes one Batch
per step out of it; what differs between prefill and decode is the policy, never a flag in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from cluster.engine.batch import Batch, ScheduledSequence, is_decoding
from cluster.engine.block_manager import BlockManager
from cluster.engine.cohort import Cohort
from cluster.engine.sequence import Sequence
from cluster.engine.speculation.speculator import Speculator

HELD_UP_SHARE = 1 / 8  # see `Scheduler.is_held_up`


class Policy(Protocol):
    """Decides which rows a step computes. `prefill/policy.py` and `decode/policy.py` are the two."""

    @property
    def hands_over(self) -> bool:
        """True: a sequence leaves with its blocks leased as soon as its first token is drawn."""
        ...

    def schedule(self, scheduler: Scheduler) -> list[ScheduledSequence]:
        """Choose rows within the limits; every entry comes from `Scheduler.take`. Not asked while a cohort goes
        on: a policy that keeps its sequences gives each its next row where there is room."""
        ...


class Scheduler:
    """Holds the sequences of one engine. All block changes of sequences go through here.

    `speculator` None: no drafts are proposed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        policy: Policy,
        *,
        max_num_sequences: int,
        max_batched_tokens: int,
        speculator: Speculator | None = None,
    ) -> None:
        self.blocks = blocks
        self.speculator = speculator
        self.max_num_sequences = max_num_sequences
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cache_queries = 0  # tokens looked up in the prefix cache
        self.num_cached_tokens = 0  # tokens found there
        self._policy = policy
        self._just_admitted: list[Sequence] = []
        self._num_by_history = 0  # running sequences that draw by their history
        self._cohort: Cohort | None = None  # all that runs, if the last step was a row of each and no more has changed
        self._num_steps = 0

    # ---- the engine's side

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def add_running(self, sequence: Sequence) -> None:
        """A sequence that comes with its blocks, their KV stored already."""
        assert sequence.table is not None
        sequence.was_admitted = True
        self._enter(sequence)

    def schedule(self) -> Batch | None:
        """The next step, or None if nothing can run now."""
        if self._cohort is not None and self._can_continue(self._cohort):
            self._num_steps += 1
            reads_pending_tokens = self._cohort.advance()
            return Batch.of_cohort(self._num_steps, self._cohort, reads_pending_tokens=reads_pending_tokens)
        scheduled = self._policy.schedule(self)
        self._cohort = self._find_cohort(scheduled)
        if not scheduled:
            return None
        self._num_steps += 1
        batch = Batch(self._num_steps, tuple(scheduled), self._cohort)
        assert len(scheduled) <= self.max_num_sequences
        assert batch.num_tokens <= self.max_batched_tokens
        return batch

    def _can_continue(self, cohort: Cohort) -> bool:
        """The policy would take one more row of each sequence; there is room for them then. If it lacks, the
        blocks that were given before it showed are those that the policy gives first."""
        if cohort.age == cohort.max_age or (self.waiting and len(self.running) < self.max_num_sequences):
            return False
        return all(self.grow(cohort.sequences[place]) for place in cohort.opening(cohort.age + 1))

    def _find_cohort(self, scheduled: list[ScheduledSequence]) -> Cohort | None:
        """None also where what comes next hangs on the tokens that are drawn."""
        if self._policy.hands_over or self.speculator is not None or self._num_by_history:
            return None
        if not scheduled or len(scheduled) != len(self.running) or not all(map(is_decoding, scheduled)):
            return None
        starts = [entry.start for entry in scheduled]
        return Cohort(tuple([entry.sequence for entry in scheduled]), starts, self.blocks.block_size)

    @property
    def is_held_up(self) -> bool:
        """True while so much of what runs waits for tokens on the device that they should be learned before
        the next step is prepared.

        A step prepared ahead hides the host's share h of a step, at most a tenth. A share f of the
        sequences that sits out every second step meanwhile, each worth 1 + a tokens a step, costs
        f (1 + a) / 2, which is more from about f = 1/8 on.
        """
        if self.speculator is None and self._num_by_history == 0:
            return False
        num_waiting = sum(
            sequence.num_pending_tokens > 0
            and sequence.num_tokens < sequence.max_total_tokens
            and not self.can_run(sequence)
            for sequence in self.running
        )
        return num_waiting > 0 and num_waiting >= HELD_UP_SHARE * len(self.running)

    def drain_admitted(self) -> list[Sequence]:
        """Sequences that got blocks for the first time since the last call."""
        admitted, self._just_admitted = self._just_admitted, []
        return admitted

    def count_cache_query(self, num_tokens: int, num_cached_tokens: int) -> None:
        self.num_cache_queries += num_tokens
        self.num_cached_tokens += num_cached_tokens

    def leave(self, sequence: Sequence) -> None:
        """The sequence is finished or handed over. Its blocks are freed when no launched step can still
        write them (`release_blocks`)."""
        if sequence.table is None:
            self.waiting.remove(sequence)
        else:
            self._cohort = None
            self.running.remove(sequence)
            self._num_by_history -= sequence.draws_by_history
        if sequence.num_in_flight == 0:
            self.release_blocks(sequence)

    def release_blocks(self, sequence: Sequence) -> None:
        assert sequence.num_in_flight == 0, "a launched step may still write the blocks"
        if sequence.table is not None:
            self.blocks.free(sequence.table)
            sequence.table = None
            if self.speculator is not None:
                self.speculator.on_released(sequence)

    # ---- the policy's side

    def can_run(self, sequence: Sequence) -> bool:
        """False while a running sequence must or had better wait for tokens that are on the device."""
        if sequence.num_pending_tokens == 0:
            return True
        return sequence.can_run and (self.speculator is None or not self.speculator.awaits_token(sequence))

    def propose_drafts(self, decoding: list[Sequence], budget: int) -> list[tuple[int, ...]]:
        """Drafts for sequences whose next row is their newest token, parallel to them, `budget` tokens at
        most. There is room for them then; it never takes the last free block of a running sequence, so
        drafts cause no preemption."""
        if self.speculator is None:
            return [()] * len(decoding)
        return self.speculator.propose(decoding, self.blocks, budget, keep_free=len(self.running))

    def admit(self, keep_free: int = 0) -> Sequence | None:
        """Give the first waiting sequence blocks for all its tokens and move it to `running`. None if
        there is none, or if it must wait: for a place, or for blocks (`keep_free` of them stay free)."""
        if not self.waiting or len(self.running) >= self.max_num_sequences:
            return None
        sequence = self.waiting[0]
        assert sequence.num_in_flight == 0
        table = self.blocks.allocate(
            sequence.chain, len(sequence.token_ids), sequence.max_reusable_tokens, keep_free if self.running else 0
        )
        if table is None:
            return None
        self.waiting.popleft()
        self._enter(sequence)
        sequence.table = table
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = table.num_cached_tokens
        self.count_cache_query(len(sequence.token_ids), table.num_cached_tokens)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = min(table.num_cached_tokens, sequence.prompt_length)
            self._just_admitted.append(sequence)
        return sequence

    def admit_prompts(self, prompts: list[Sequence], budget: int, *, keeps_room: bool) -> None:
        """Append newly admitted sequences to `prompts` until there is enough to choose from for a step of
        `budget` rows. No prompt counts for more than an eighth of it, so short prompts get in beside
        long ones; more would only hide prefixes from each other that are about to be cached.

        `keeps_room`: each running sequence keeps a free block to grow into; without it, admitting would
        only cause the next preemption.
        """
        share = max(budget // 8, 1)
        num_rows = sum(min(sequence.num_unscheduled_tokens, share) for sequence in prompts)
        while num_rows < budget:
            sequence = self.admit(keep_free=len(self.running) if keeps_room else 0)
            if sequence is None:
                return
            prompts.append(sequence)
            num_rows += min(sequence.num_unscheduled_tokens, share)

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of a running sequence; False if blocks lack."""
        table, num_tokens = sequence.table, len(sequence.token_ids) + sequence.num_pending_tokens
        assert table is not None
        has_room = num_tokens <= len(table.block_ids) * self.blocks.block_size  # the usual case, and cheap
        return has_room or self.blocks.grow(table, num_tokens)

    def preempt_newest(self) -> bool:
        """Send the newest running sequence back to the head of the queue, without its blocks. False if
        a launched step holds rows of it: then it must sit out a step first."""
        victim = self.running[-1]
        if victim.num_in_flight:
            return False
        self._cohort = None
        self.running.pop()
        self._num_by_history -= victim.draws_by_history
        self.release_blocks(victim)
        victim.num_computed_tokens = victim.num_scheduled_tokens = 0
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return True

    def take(self, sequence: Sequence, max_rows: int, drafts: tuple[int, ...] = ()) -> ScheduledSequence:
        """Schedule the next rows of a running sequence that has room for them, its drafts behind them."""
        start, num_known = sequence.num_scheduled_tokens, len(sequence.token_ids)
        num_tokens = num_known + sequence.num_pending_tokens
        end = min(num_tokens, start + max_rows)
        assert end > start
        samples = end == num_tokens
        entry = ScheduledSequence(sequence, start, end - start + len(drafts), samples, end > num_known, drafts)
        assert not drafts or (samples and not entry.reads_pending_token)
        sequence.num_scheduled_tokens = end
        sequence.num_in_flight += 1
        sequence.num_pending_tokens += samples
        sequence.num_pending_drafts = len(drafts)
        return entry

    def take_decoding(self, decoding: list[Sequence], drafts: list[tuple[int, ...]]) -> list[ScheduledSequence]:
        """`take` of sequences whose next row is their newest token."""
        if self.speculator is not None:
            return [self.take(sequence, 1, guess) for sequence, guess in zip(decoding, drafts, strict=True)]
        entries = []
        for sequence in decoding:
            start, num_pending = sequence.num_scheduled_tokens, sequence.num_pending_tokens
            sequence.num_scheduled_tokens = start + 1
            sequence.num_in_flight += 1
            sequence.num_pending_tokens = num_pending + 1
            entries.append(ScheduledSequence(sequence, start, 1, True, num_pending > 0))
        return entries

    def settle_drafts(self, entry: ScheduledSequence) -> None:
        """The step of an entry with drafts has been committed: rows behind the last token that counts are
        computed anew, and blocks grown for them are given back."""
        sequence = entry.sequence
        assert sequence.table is not None
        assert sequence.num_in_flight == 0
        sequence.num_scheduled_tokens = sequence.num_computed_tokens
        self.blocks.shrink(sequence.table, sequence.num_tokens)

    def _enter(self, sequence: Sequence) -> None:
        self._cohort = None
        self.running.append(sequence)
        self._num_by_history += sequence.draws_by_history

    def take_prompt_chunks(self, prompts: Iterable[Sequence], budget: int, max_count: int) -> list[ScheduledSequence]:
        """Share `budget` rows among sequences that have several rows to compute, oldest first in
        `prompts`.

        The oldest may take half of the budget, which bounds the wait of a long prompt; the rest goes to
        the prompts with the fewest rows left, so a short one does not wait for a long one; what remains
        goes to the oldest again. Ties by age.
        """
        remaining = [sequence for sequence in prompts if sequence.num_unscheduled_tokens > 0][:max_count]
        if not remaining or budget <= 0:
            return []
        rows = {id(sequence): 0 for sequence in remaining}
        oldest = remaining[0]
        shares = [(oldest, -(-budget // 2))]
        shares += [(each, budget) for each in sorted(remaining, key=lambda each: each.num_unscheduled_tokens)]
        for sequence, limit in shares:
            more = min(limit, budget, sequence.num_unscheduled_tokens - rows[id(sequence)])
            rows[id(sequence)] += more
            budget -= more
        return [self.take(sequence, rows[id(sequence)]) for sequence in remaining if rows[id(sequence)]]
