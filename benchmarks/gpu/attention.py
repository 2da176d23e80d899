"""Paged attention: decode against copy bandwidth, prefill against torch's SDPA, and bits across paths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clocks import MULTIPROCESSORS
from benchmarks.gpu.timing import graph_ms
from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention_launch
from cluster.engine.kernels.triton.plans import AttentionPlan


def paged_inputs(
    rows: list[int], contexts: list[int], *, num_heads: int = 32, num_kv_heads: int = 8, head_size: int = 128,
    block_size: int = 64, num_layers: int = 2, context_len_max: int | None = None, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:  # fmt: skip
    """q (T, H, D), the whole cache (N, L, 2, G, S, D) and metadata; blocks shuffled, stale slots NaN."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 1
    shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_size)
    kv = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    order = torch.randperm(num_blocks, generator=generator, device="cuda", dtype=torch.int64).to(torch.int32)
    table = torch.zeros((len(rows), max(counts)), dtype=torch.int32, device="cuda")
    place = 0
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        table[sequence, :count] = order[place : place + count]
        place += count
        kv[table[sequence, count - 1].long(), :, :, :, context - (count - 1) * block_size :] = float("nan")
    q = torch.empty((sum(rows), num_heads, head_size), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(c - r, c) for r, c in zip(rows, contexts, strict=True)]).cuda()
    metadata = AttentionMetadata(
        query_start=starts,
        context_len=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        block_table=table,
        slot_mapping=torch.full((sum(rows),), -1, dtype=torch.int64, device="cuda"),
        positions=positions,
        num_rows_max=max(rows),
        num_rows_min=min(rows),
        context_len_max=context_len_max or max(contexts),
    )
    return q, kv, metadata


def decode_fraction(
    batch: int,
    context: int,
    plan: AttentionPlan,
    copy_tb_s: float,
    inputs: tuple[torch.Tensor, torch.Tensor, AttentionMetadata],
) -> tuple[float, float]:
    """(milliseconds, KV bytes read per second over copy bandwidth)."""
    q, kv, metadata = inputs
    scale = q.shape[2] ** -0.5
    lists = attention_launch.WorkLists()  # as in a step, where all layers share them

    def call(layer: int) -> Callable[[], torch.Tensor]:
        return lambda: attention_launch.run_attention(
            q, kv[:, layer], metadata, scale, plan, MULTIPROCESSORS, lists=lists
        )

    milliseconds = graph_ms([call(layer) for layer in range(kv.shape[1])], min_ms=3.0, replays=3)
    num_bytes = batch * context * 2 * kv.shape[3] * kv.shape[5] * 2
    return milliseconds, num_bytes / milliseconds / 1e9 / copy_tb_s


def sdpa_ms(
    batch: int, length: int, num_heads: int = 32, num_kv_heads: int = 8, head_size: int = 128
) -> dict[str, float]:
    """Milliseconds of each SDPA backend that takes the shape, causal, grouped heads."""
    shape = (batch, length, num_heads, head_size)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    kv_shape = (batch, length, num_kv_heads, head_size)
    k = torch.randn(kv_shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    v = torch.randn(kv_shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    wide_k, wide_v = (t.repeat_interleave(num_heads // num_kv_heads, 1) for t in (k, v))
    found: dict[str, float] = {}
    attend = torch.nn.functional.scaled_dot_product_attention
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for grouped in (True, False):
            keys, values = (k, v) if grouped else (wide_k, wide_v)

            def call(keys: torch.Tensor = keys, values: torch.Tensor = values, grouped: bool = grouped) -> torch.Tensor:
                return attend(q, keys, values, is_causal=True, enable_gqa=grouped)

            try:
                with sdpa_kernel(backend):
                    found[f"{backend.name}{'' if grouped else ' expanded'}"] = graph_ms([call], min_ms=5.0, replays=3)
            except RuntimeError:
                continue
    return found


def prefill_ms(plan: AttentionPlan, inputs: tuple[torch.Tensor, torch.Tensor, AttentionMetadata]) -> float:
    q, kv, metadata = inputs
    scale = q.shape[2] ** -0.5
    lists = attention_launch.WorkLists()

    def call() -> torch.Tensor:
        return attention_launch.run_attention(q, kv[:, 0], metadata, scale, plan, MULTIPROCESSORS, lists=lists)

    return graph_ms([call], min_ms=5.0, replays=3)
