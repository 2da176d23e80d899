"""What an engine is told at start. Measured values (such as the number of blocks) are not here."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

DEFAULT_GPU_FRACTION = 0.95  # of the memory of a GPU, for all workers on it


class SpeculationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guessing tokens that the model then verifies in one step. The output has the same bits with and without."""

    method: Literal["none", "ngram", "draft"] = "none"  # ngram: as the text went on before; draft: by a small model
    num_tokens: int = 8  # the most guesses of a sequence in a step; it adapts to how many come true
    ngram_min: int = 3  # tokens that must have occurred before
    ngram_max: int = 8  # tokens that are compared to choose among several occurrences
    draft_model: str | None = None  # as `model.path`, with the same vocabulary; its KV shares `kv_cache_bytes`


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one engine; validated by `cluster.config` before it gets here."""

    block_size: int | None = None  # tokens per KV block, a multiple of 16; null: 32 on a CPU, 64 on a GPU
    kv_cache_bytes: int | None = None  # size of the KV pool; None: chosen from the memory that is free (pool_size.py)
    max_num_sequences: int | None = None  # running at once; null: 64 on a CPU, 512 on a GPU
    max_batched_tokens: int | None = None  # per step, chunks of prompts and decoding; null: 512 on a CPU, 8192 on a GPU
    max_model_len: int | None = None  # None: the model's own
    enable_prefix_caching: bool = True  # keep the KV of finished prompts for later ones that begin alike
    device: str = "cpu"  # `cpu`, `cuda` or `cuda:1`
    gpu_memory_fraction: float | None = None  # of a GPU, for weights, KV and steps; null: 0.95, shared evenly
    cuda_graphs: bool = True  # replay decode steps as CUDA graphs; false starts faster and runs slower
    graph_prompt_rows: int | None = None  # rows up to which steps with prompts are CUDA graphs; null: 1,536, 0: none
    num_threads: int | None = None  # CPU threads of the kernels; None: the cores this process may use
    compile_threads: int = 8  # on a GPU: threads that compile the fingerprint's kernels at a first start
    speculation: SpeculationConfig = SpeculationConfig()  # see the section `speculation`

    @property
    def limits(self) -> EngineLimits:
        """What was asked for, completed by the defaults of the device."""
        defaults = CPU_LIMITS if self.device == "cpu" else GPU_LIMITS
        asked = (self.block_size, self.max_num_sequences, self.max_batched_tokens, self.graph_prompt_rows)
        found = EngineLimits(
            *(default if given is None else given for given, default in zip(asked, defaults, strict=True))
        )
        if not self.cuda_graphs:
            found = found._replace(graph_prompt_rows=0)
        if found.max_batched_tokens < 1:
            return found
        # Each sequence has a row in a step: who asks for few rows asks for no more sequences, and for no larger graphs.
        if self.max_num_sequences is None:
            found = found._replace(max_num_sequences=min(found.max_num_sequences, found.max_batched_tokens))
        if self.graph_prompt_rows is None:
            found = found._replace(graph_prompt_rows=min(found.graph_prompt_rows, found.max_batched_tokens))
        return found


class EngineLimits(NamedTuple):
    """The sizes that have defaults of their own on each kind of device."""

    block_size: int
    max_num_sequences: int
    max_batched_tokens: int
    graph_prompt_rows: int  # 0: no step with prompts is a CUDA graph


CPU_LIMITS = EngineLimits(block_size=32, max_num_sequences=64, max_batched_tokens=512, graph_prompt_rows=0)
# Attention on a GPU reads keys 64 at a time, from one block if it holds as many.
GPU_LIMITS = EngineLimits(block_size=64, max_num_sequences=512, max_batched_tokens=8192, graph_prompt_rows=1536)
