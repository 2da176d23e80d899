"""GEMM plans worth trying for a shape. Shared memory of an H100 or H200 block is 227 KiB."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cluster.engine.kernels.triton.plans import LinearPlan

_SHARED_BYTES = 227 * 1024


def _fits(plan: LinearPlan, *, silu_mul: bool) -> bool:
    weights = plan.block_n * (2 if silu_mul else 1)
    stages = plan.num_stages * (plan.block_m + weights) * plan.block_k * 2
    store = plan.block_m * plan.block_n * 2 // plan.store_parts if plan.kind == "tma" else 0
    return stages + store <= _SHARED_BYTES


def few_rows(num_rows: int, *, silu_mul: bool) -> Iterator[LinearPlan]:
    """Up to 64 rows: the weight is read once, so depth of the pipeline decides."""
    block_m = max(16, 1 << (num_rows - 1).bit_length())
    tiles = ((64, 128, 8), (64, 128, 5), (64, 256, 4), (128, 64, 6), (128, 128, 5), (128, 128, 3), (64, 64, 8))
    for block_n, block_k, num_stages in tiles:
        for stages in sorted({num_stages, max(2, num_stages // 2)}):
            chain = LinearPlan(
                block_m=block_m, block_n=block_n, block_k=block_k, num_stages=stages, swap=True, evict_first=True
            )
            tma = msgspec.structs.replace(chain, kind="tma", evict_first=False, persistent=False)
            yield from (plan for plan in (chain, tma) if _fits(plan, silu_mul=silu_mul))
    for block_n, block_k, num_stages in ((32, 128, 6), (32, 256, 4), (16, 256, 5)):
        if block_m <= 32:
            yield LinearPlan(block_m=block_m, block_n=block_n, block_k=block_k, num_stages=num_stages, evict_first=True)


def many_rows(num_rows: int, *, silu_mul: bool) -> Iterator[LinearPlan]:
    """Above 64 rows: arithmetic decides, then the shape of the last wave of tiles."""
    wide = ((128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (64, 128, 64, 5, 4))
    tall = ((256, 128, 64, 3, 8), (128, 64, 64, 5, 4), (64, 64, 128, 4, 4), (64, 64, 128, 6, 4), (128, 64, 128, 4, 4))
    narrow = ((128, 32, 128, 5, 4), (64, 32, 128, 8, 4))
    for block_m, block_n, block_k, stages, warps in wide + tall + (narrow if num_rows <= 128 else ()):
        if block_m > max(64, num_rows):
            continue
        if silu_mul:
            block_n //= 2
        chain = LinearPlan(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)
        for persistent, group_m, parts in ((True, 8, 1), (False, 8, 1), (True, 16, 2)):
            plan = msgspec.structs.replace(chain, kind="tma", persistent=persistent, group_m=group_m, store_parts=parts)
            if _fits(plan, silu_mul=silu_mul):
                yield plan
        if num_rows <= 256:
            yield chain
    if num_rows <= 256:
        for block_n, block_k, stages in ((64, 128, 5), (128, 64, 5), (128, 128, 3)):
            plan = LinearPlan(
                kind="tma", block_m=128, block_n=block_n, block_k=block_k, num_stages=stages,
                swap=True, persistent=False,
            )  # fmt: skip
            if _fits(plan, silu_mul=silu_mul):
                yield plan


def candidates(num_rows: int, *, silu_mul: bool) -> list[LinearPlan]:
    """Every plan to measure for a shape class, each once."""
    found: list[LinearPlan] = [] if silu_mul else [LinearPlan(kind="cublaslt")]
    plans: list[LinearPlan] = []
    if num_rows <= 64:
        plans += few_rows(num_rows, silu_mul=silu_mul)
    if num_rows >= 64:
        plans += many_rows(num_rows, silu_mul=silu_mul)
    found += dict.fromkeys(plans)
    return found
