"""A training job in small, one process for each rank of torchrun: `python -m tests.integration.spmd_job MODEL`.

Every rank generates with the same prompts, between two uses of the process group; rank 0 reports as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster import LLM, Completion, EngineConfig, SamplingParams

PROMPTS = ("The capital of France is", "one two three", "x")
SAMPLING = SamplingParams(max_tokens=16, seed=7, temperature=0.8, logprobs=3, ignore_eos=True)
ENGINE = EngineConfig(block_size=16, num_threads=1, max_batched_tokens=64, kv_cache_bytes=8 << 20)


def bits(completions: list[Completion]) -> torch.Tensor:
    """Token ids and the bits of every logprob, (N,) int64."""
    values: list[int] = []
    for completion in completions:
        values += completion.token_ids
        for entry in completion.logprobs:
            numbers = (entry.logprob, *(logprob for _, logprob in entry.top))
            values += torch.tensor(numbers, dtype=torch.float32).view(torch.int32).tolist()
    return torch.tensor(values, dtype=torch.int64)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def main(model: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.set_num_threads(2)  # the trainer's own choice
    before = gathered(torch.tensor([rank]))
    with LLM(model, engine=ENGINE) as llm:
        threads = [torch.get_num_threads()]
        first = bits(llm.generate(PROMPTS, SAMPLING))
        weights = torch.full((1000,), float(rank))
        dist.all_reduce(weights)  # a trainer's step between two generations
        second = bits(llm.generate(PROMPTS, SAMPLING))
    threads.append(torch.get_num_threads())
    after = torch.tensor([rank + 1.0])
    dist.all_reduce(after)
    answers = gathered(torch.cat([first, second]))
    if rank == 0:
        report = {
            "ranks": [int(part) for part in before],
            "num_values": first.numel(),
            "equal_over_time": torch.equal(first, second),
            "equal_over_ranks": all(torch.equal(answers[0], answer) for answer in answers),
            "sum_between": sorted(set(weights.tolist())),
            "sum_after": after.item(),
            "threads": threads,
        }
        sys.stdout.write(f"REPORT {json.dumps(report)}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
