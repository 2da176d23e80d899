"""What is wrong with values of the configuration, each with its key and the way out."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator

from cluster.engine.config import EngineConfig, SpeculationConfig

MIB = 1 << 20
DEVICE_KINDS = ("cpu", "cuda")


def between(path: str, value: float, low: float, high: float, hint: str = "") -> Iterator[str]:
    """`low` and `high` are allowed; `hint` says what to do."""
    if math.isnan(value) or not low <= value <= high:
        yield f"{path}: must be between {low:,} and {high:,}, got {value:,}" + (f"; {hint}" if hint else "")


def host_problems(path: str, host: str) -> Iterator[str]:
    """`host` is to be listened on or reached."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not host or len(host) > 253 or not all(part.replace("-", "a").isalnum() for part in host.split(".")):
            yield f"{path}: {host!r} is neither an IP address nor a host name; without a port, such as 127.0.0.1"


def engine_problems(path: str, engine: EngineConfig, least_pool_bytes: int = MIB) -> Iterator[str]:
    """Of an engine's values; `path` is where they stand in the configuration. `least_pool_bytes`: fewer are a number
    whose unit was forgotten, where one may be given."""
    limits = engine.limits
    yield from between(f"{path}.block_size", limits.block_size, 16, 256, "it is a number of tokens, such as 32")
    if limits.block_size % 16:
        nearest = max(16, round(limits.block_size / 16) * 16)
        yield f"{path}.block_size: must be a multiple of 16, got {limits.block_size}; the nearest is {nearest}"
    if engine.kv_cache_bytes is not None:
        hint = "write it with a unit, such as 2GiB, or leave it out to have it chosen from the free memory"
        yield from between(f"{path}.kv_cache_bytes", engine.kv_cache_bytes, least_pool_bytes, 1 << 44, hint)
    yield from between(f"{path}.max_num_sequences", limits.max_num_sequences, 1, 4096)
    yield from between(f"{path}.max_batched_tokens", limits.max_batched_tokens, 16, 1 << 20)
    if limits.max_batched_tokens < limits.max_num_sequences:
        yield (
            f"{path}.max_batched_tokens: {limits.max_batched_tokens} is less than max_num_sequences "
            f"({limits.max_num_sequences}), so not every running sequence could advance in a step; raise it"
        )
    if engine.graph_prompt_rows is not None:
        hint = "steps with prompts are graphs up to that many rows, and none has more than max_batched_tokens"
        yield from between(f"{path}.graph_prompt_rows", engine.graph_prompt_rows, 0, limits.max_batched_tokens, hint)
        if engine.graph_prompt_rows > 0 and not engine.cuda_graphs:
            yield f"{path}.graph_prompt_rows: {engine.graph_prompt_rows} with cuda_graphs false; leave one of them out"
    if engine.max_model_len is not None:
        yield from between(f"{path}.max_model_len", engine.max_model_len, 16, 1 << 24, "leave it out for the model's")
    if engine.gpu_memory_fraction is not None:
        yield from between(f"{path}.gpu_memory_fraction", engine.gpu_memory_fraction, 0.01, 1.0)
    if engine.num_threads is not None:
        yield from between(f"{path}.num_threads", engine.num_threads, 1, 1024, "leave it out to have it chosen")
    yield from between(f"{path}.compile_threads", engine.compile_threads, 1, 64)
    if engine.device.split(":")[0] not in DEVICE_KINDS:
        yield f"{path}.device: must be one of {', '.join(DEVICE_KINDS)}, got {engine.device!r}"
    yield from _speculation_problems(f"{path}.speculation", engine.speculation)


def _speculation_problems(path: str, speculation: SpeculationConfig) -> Iterator[str]:
    yield from between(f"{path}.num_tokens", speculation.num_tokens, 1, 64, "`method: none` turns it off")
    yield from between(f"{path}.ngram_min", speculation.ngram_min, 1, 32)
    yield from between(f"{path}.ngram_max", speculation.ngram_max, 1, 32)
    if (speculation.method == "draft") != (speculation.draft_model is not None):
        fix = (
            f"set {path}.draft_model"
            if speculation.draft_model is None
            else "set it to draft, or leave draft_model out"
        )
        has_model = "no" if speculation.draft_model is None else "a"
        yield f"{path}.method: {speculation.method} with {has_model} draft_model; {fix}"
    if speculation.ngram_min > speculation.ngram_max:
        yield (
            f"{path}.ngram_min: {speculation.ngram_min} is more than ngram_max ({speculation.ngram_max}); "
            "lower it, or raise the other"
        )
