"""Which rows a prefill engine computes in a step: chunks of prompts, nothing else."""

from __future__ import annotations

from cluster.engine.batch import ScheduledSequence
from cluster.engine.scheduler import Scheduler


class PrefillPolicy:
    """Chunked prompts within the token budget; a sequence leaves after its first token.

    All blocks of a prompt are allocated at its admission, because their ids are published before the
    first chunk is computed; so a running prompt never lacks blocks and nothing is ever preempted. A
    prompt that finds too few free blocks waits, in order of arrival, for a lease to end.
    """

    hands_over = True

    def schedule(self, scheduler: Scheduler) -> list[ScheduledSequence]:
        budget = scheduler.max_batched_tokens
        prompts = [sequence for sequence in scheduler.running if sequence.num_pending_tokens == 0]
        scheduler.admit_prompts(prompts, budget, keeps_room=False)
        return scheduler.take_prompt_chunks(prompts, budget, scheduler.max_num_sequences)
