"""GEMM plans worth trying for a shape. Shared memory of an H100 or H200 block is 227 KiB."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cluster.engine.kernels.triton.plans import LinearPlan

_SHARED_BYTES = 227 * 1024


def _shared_bytes(plan: LinearPlan, *, silu_mul: bool) -> int:
    """Buffers of bf16 operands and result; `block_n` of a hopper plan counts gate and up columns."""
    halves = 2 if silu_mul else 1
    weights = plan.block_n * (1 if plan.kind == "hopper" else halves)
    stages = plan.num_stages * (plan.block_m + weights) * plan.block_k * 2
    if plan.kind == "hopper":
        return stages + plan.block_m * plan.block_n // halves * 2 // plan.store_parts
    return stages + (plan.block_m * plan.block_n * 2 // plan.store_parts if plan.kind == "tma" else 0)


def fits(plan: LinearPlan, *, silu_mul: bool) -> bool:
    """Whether its buffers fit into one block's shared memory, and the kernel has such tiles."""
    if silu_mul and plan.kind == "stream" and plan.block_n.bit_count() > 1:
        return False
    barriers = 1024 if plan.kind in ("stream", "hopper") else 0
    return _shared_bytes(plan, silu_mul=silu_mul) + barriers <= _SHARED_BYTES


def stream(num_rows: int, *, silu_mul: bool) -> Iterator[LinearPlan]:
    """Up to 128 rows, weights requested ahead of the wait: a program per tile, and programs that go on to more tiles.
    Above 64 rows also two tiles of 64, where outputs are so few that tiles of all rows would leave programs idle;
    with SwiGLU only these, for registers' sake."""
    block_m = max(8, 1 << (num_rows - 1).bit_length())
    wide = ((64, 128, 10), (64, 64, 10), (64, 128, 6), (64, 128, 5), (64, 256, 6), (128, 64, 10), (128, 64, 5))
    heights = (block_m,) if block_m <= 64 else (64,) if silu_mul else (64, block_m)
    shapes = [(rows, n, k, stages, 4, True) for rows in heights for n, k, stages in wide]
    shapes += [(64, 32, 128, stages, 4, False) for stages in (4, 8)]
    shapes += [(64, n, 128, stages, 4, False) for n, stages in ((48, 5), (48, 7), (80, 4), (80, 5), (96, 5))]
    if block_m <= 32:
        narrow = ((32, 256, 4, 4), (32, 256, 8, 4), (16, 256, 8, 2), (64, 256, 5, 4))
        shapes += [(max(16, block_m), n, k, stages, warps, False) for n, k, stages, warps in narrow]
    for rows, block_n, block_k, stages, warps, swap in shapes:
        plan = LinearPlan(
            kind="stream", block_m=rows, block_n=block_n, block_k=block_k, num_warps=warps, swap=swap,
            num_stages=(stages + 1) // 2 if silu_mul else stages, persistent=False,
        )  # fmt: skip
        if fits(plan, silu_mul=silu_mul):
            twice = 2 * (_shared_bytes(plan, silu_mul=silu_mul) + 2048) <= _SHARED_BYTES
            yield plan
            yield msgspec.structs.replace(plan, persistent=True, programs_per_multiprocessor=2 if twice else 1)


def hopper(num_rows: int, *, silu_mul: bool) -> Iterator[LinearPlan]:
    """Above 64 rows: a producer warp, two or three warp groups of consumers. Up to 256 rows also tiles as tall as all
    rows are, so narrow that there are about as many as multiprocessors: each weight is read once."""
    tall = next((rows for rows in (128, 192, 256) if num_rows <= rows), 0)
    narrow = [(tall, 128, stages, 8) for stages in (4, 5, 6)] + [(tall, 64, stages, 8) for stages in (5, 6)]
    narrow += [(tall, 32, stages, 8) for stages in (5, 7)]
    wide = [(128, 256, 4, 8), (128, 256, 4, 16), (128, 256, 3, 8), (256, 128, 4, 8)]
    tiles = dict.fromkeys((narrow if tall else []) + (wide if num_rows > 128 else []))
    for block_m, block_n, stages, group_m in tiles:
        if (block_n <= 32 and silu_mul) or block_m > max(num_rows, tall):
            continue
        for parts in (1, 2):
            plan = LinearPlan(
                kind="hopper", block_m=block_m, block_n=block_n, block_k=64, num_stages=stages, group_m=group_m,
                store_parts=parts,
            )  # fmt: skip
            if fits(plan, silu_mul=silu_mul):
                yield plan
                break


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
            yield from (plan for plan in (chain, tma) if fits(plan, silu_mul=silu_mul))
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
            if fits(plan, silu_mul=silu_mul):
                yield plan
        if num_rows <= 256:
            yield chain
    if num_rows <= 256:
        swapped = [(128, 64, 128, 5), (128, 128, 64, 5), (128, 128, 128, 3)]
        if num_rows > 128:  # 160 or 192 rows are two and a half or three tiles of 64
            swapped += [(64, 128, 64, 6), (64, 128, 128, 4)]
        for block_m, block_n, block_k, stages in swapped:
            plan = LinearPlan(
                kind="tma", block_m=block_m, block_n=block_n, block_k=block_k, num_stages=stages,
                swap=True, persistent=False,
            )  # fmt: skip
            if fits(plan, silu_mul=silu_mul):
                yield plan


def candidates(num_rows: int, *, silu_mul: bool) -> list[LinearPlan]:
    """Every plan to measure for a shape class, each once."""
    found: list[LinearPlan] = [] if silu_mul else [LinearPlan(kind="cublaslt")]
    plans: list[LinearPlan] = []
    if num_rows <= 64:
        plans += few_rows(num_rows, silu_mul=silu_mul)
    if num_rows <= 128:
        plans += stream(num_rows, silu_mul=silu_mul)
    if num_rows >= 64:
        plans += many_rows(num_rows, silu_mul=silu_mul)
    if num_rows > 64:
        plans += hopper(num_rows, silu_mul=silu_mul)
    found += dict.fromkeys(plans)
    return found
