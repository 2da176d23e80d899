"""Which rows a decode engine computes in a step: one per decoding sequence, then chunks of prompts."""

from __future__ import annotations

from cluster.engine.batch import ScheduledSequence
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence


class DecodePolicy:
    """Continuous batching. Decode rows come first, then drafts of their next tokens; what remains of the
    token budget, half of it at least, goes to prompts that are computed here: recomputed ones after a
    preemption or a failed transfer, and all of them where there is no prefill pool.

    When blocks run out, the newest sequence is preempted and its tokens are recomputed later. The
    oldest is never preempted for a younger one and the engine admits only what fits the pool alone, so
    some sequence always advances (sglang#6857).
    """

    hands_over = False

    def schedule(self, scheduler: Scheduler) -> list[ScheduledSequence]:
        runnable = self._secure_blocks(scheduler)
        decoding: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in runnable:
            (decoding if sequence.num_unscheduled_tokens == 1 else prompts).append(sequence)
        decoding = decoding[: min(scheduler.max_num_sequences, scheduler.max_batched_tokens)]
        budget = scheduler.max_batched_tokens - len(decoding)
        drafts = scheduler.propose_drafts(decoding, budget // 2 if prompts or scheduler.waiting else budget)
        scheduled = scheduler.take_decoding(decoding, drafts)
        budget -= sum(map(len, drafts))
        num_places = scheduler.max_num_sequences - len(scheduled)
        scheduler.admit_prompts(prompts, budget, keeps_room=True)
        return scheduled + scheduler.take_prompt_chunks(prompts, budget, num_places)

    def _secure_blocks(self, scheduler: Scheduler) -> list[Sequence]:
        """The running sequences that can take part in this step, oldest first, each with room for its
        tokens."""
        runnable: list[Sequence] = []
        index = 0
        while index < len(scheduler.running):
            sequence = scheduler.running[index]
            if not scheduler.can_run(sequence):
                index += 1
            elif scheduler.grow(sequence):
                runnable.append(sequence)
                index += 1
            elif not scheduler.preempt_newest():
                break  # the newest, and all from here on, sit out this step; then it can be preempted
        return runnable
