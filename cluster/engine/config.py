"""What an engine is told at start. Measured values (such as the number of blocks) are not here."""

from __future__ import annotations

from typing import Literal

import msgspec


class SpeculationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guessing tokens that the model then verifies in one step. The output has the same bits with and without."""

    method: Literal["none", "ngram", "draft"] = "none"  # ngram: as the text went on before; draft: by a small model
    num_tokens: int = 8  # the most guesses of a sequence in a step; it adapts to how many come true
    ngram_min: int = 3  # tokens that must have occurred before
    ngram_max: int = 8  # tokens that are compared to choose among several occurrences
    draft_model: str | None = None  # as `model.path`, with the same vocabulary; its KV shares `kv_cache_bytes`


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one engine; validated by `cluster.config` before it gets here."""

    block_size: int = 32  # tokens per KV block; a multiple of 16
    kv_cache_bytes: int | None = None  # size of the KV pool; None: chosen from the memory that is free (pool_size.py)
    max_num_sequences: int = 64  # running at once
    max_batched_tokens: int = 512  # per step: prefill chunk budget, decode tokens included
    max_model_len: int | None = None  # None: the model's own
    enable_prefix_caching: bool = True  # keep the KV of finished prompts for later ones that begin alike
    device: str = "cpu"  # `cpu`, `cuda` or `cuda:1`
    num_threads: int | None = None  # CPU threads of the kernels; None: the cores this process may use
    speculation: SpeculationConfig = SpeculationConfig()  # see the section `speculation`
