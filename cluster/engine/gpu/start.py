"""From a loaded model to an engine that can step on a GPU: measure, allocate, warm up."""

from __future__ import annotations

import torch

from cluster.engine.config import EngineConfig
from cluster.engine.gpu import memory
from cluster.engine.gpu.host_copy import NUM_BUFFERS
from cluster.engine.gpu.model import GpuModel
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.pool_size import blocks_of


def start_gpu(
    model: GpuModel,
    ops: CudaOps,
    layout: KVLayout,
    config: EngineConfig,
    max_model_len: int,
    draft_layout: KVLayout | None = None,
) -> tuple[KVCache, GpuModelRunner]:
    """The KV pool and a runner over it, ready to serve; with `draft_layout`, room for a draft model's pool
    is left. `StartupError` if it does not fit."""
    device = ops.device
    with torch.cuda.device(device):
        memory.warn_of_neighbours(device)
        largest = f"a step of max_batched_tokens {config.limits.max_batched_tokens}"
        with memory.room_for(largest, device, "lower engine.max_batched_tokens"):
            step_bytes = _measure_step(model, ops, layout, config, max_model_len)
        num_bytes, source = memory.pool_bytes(config, device, step_bytes)
        fix = memory.MORE_POOL if config.kv_cache_bytes is None else "raise engine.kv_cache_bytes"
        num_blocks = blocks_of(layout, num_bytes, source, max_model_len, draft_layout, fix=fix)
        kv_cache = memory.allocate_pool(layout, num_blocks, device)
        with memory.room_for("what steps need beside the KV pool", device, memory.LESS_POOL):
            runner = _target_runner(model, ops, kv_cache, config, max_model_len)
            runner.warm_up()
    return kv_cache, runner


def start_draft(
    model: GpuModel, ops: CudaOps, layout: KVLayout, config: EngineConfig, num_blocks: int, max_model_len: int
) -> GpuModelRunner:
    """A draft model's runner over a pool of its own."""
    with torch.cuda.device(ops.device):
        kv_cache = memory.allocate_pool(layout, num_blocks, ops.device)
        with memory.room_for("what the draft model's steps need", ops.device, memory.LESS_POOL):
            runner = make_draft_runner(model, ops, kv_cache, config, max_model_len)
            runner.warm_up()
    return runner


def make_draft_runner(
    model: GpuModel, ops: CudaOps, kv_cache: KVCache, config: EngineConfig, max_model_len: int
) -> GpuModelRunner:
    """Where all drafts came true, its next step has two rows of a sequence. All passes of a proposal are launched
    before the first is collected."""
    return _runner(
        model, ops, kv_cache, config, max_model_len, max_drafts=1, max_uncollected=config.speculation.num_tokens
    )


def _target_runner(
    model: GpuModel, ops: CudaOps, kv_cache: KVCache, config: EngineConfig, max_model_len: int,
    max_pool_keys: int | None = None,
) -> GpuModelRunner:  # fmt: skip
    return _runner(
        model,
        ops,
        kv_cache,
        config,
        max_model_len,
        max_drafts=_max_drafts(config),
        graph_prompt_rows=config.limits.graph_prompt_rows,
        max_pool_keys=max_pool_keys,
    )


def _runner(
    model: GpuModel,
    ops: CudaOps,
    kv_cache: KVCache,
    config: EngineConfig,
    max_model_len: int,
    *,
    max_drafts: int,
    graph_prompt_rows: int = 0,
    max_uncollected: int = NUM_BUFFERS - 1,
    max_pool_keys: int | None = None,
) -> GpuModelRunner:
    return GpuModelRunner(
        model,
        ops,
        kv_cache,
        device=ops.device,
        max_batched_tokens=config.limits.max_batched_tokens,
        max_num_sequences=config.limits.max_num_sequences,
        max_model_len=max_model_len,
        max_drafts=max_drafts,
        use_graphs=config.cuda_graphs,
        graph_prompt_rows=graph_prompt_rows,
        max_uncollected=max_uncollected,
        max_pool_keys=max_pool_keys,
    )


def _measure_step(model: GpuModel, ops: CudaOps, layout: KVLayout, config: EngineConfig, max_model_len: int) -> int:
    """Bytes that the largest step has allocated at its peak, on a pool of one block, and what graphs of steps with
    prompts will take: with scratch for as many keys as a pool of all that is free would have.

    The library's products are compared before: a comparison takes more than a step, and its memory is given
    back before the pool takes what is free.
    """
    kv_cache = KVCache(layout, 1, ops.device)
    free, _ = torch.cuda.mem_get_info()
    most_keys = (config.kv_cache_bytes or free) // layout.block_bytes * layout.block_size
    runner = _target_runner(model, ops, kv_cache, config, max_model_len, max_pool_keys=most_keys)
    runner.compile_all()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.run_largest()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    graph_bytes = runner.expected_prompt_graph_bytes()
    del runner, kv_cache
    torch.cuda.empty_cache()
    return peak + graph_bytes


def _max_drafts(config: EngineConfig) -> int:
    return 0 if config.speculation.method == "none" else config.speculation.num_tokens
