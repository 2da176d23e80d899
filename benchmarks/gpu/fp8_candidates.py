"""FP8 plans worth trying for a row count. Shared memory of an H100 or H200 block is 227 KiB."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.engine.kernels.fp8 import GROUP
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan

_SHARED_BYTES = 227 * 1024


def _fits(plan: Fp8Plan, *, silu_mul: bool) -> bool:
    halves = 2 if silu_mul else 1
    match plan.kind:
        case "stream":
            used = plan.num_stages * 4 * GROUP * (plan.block_m + 64 * halves)
        case "rings":
            used = GROUP * 128 * (plan.x_stages + plan.num_stages)
            used += 128 * 128 * 2 // plan.store_parts + 1024  # that many bytes of fp32 results too: in more parts
        case "tma":
            store = plan.block_m * plan.block_n * 2 // plan.store_parts
            used = plan.num_stages * GROUP * (plan.block_m + plan.block_n * halves) + store
        case _:
            used = plan.num_stages * GROUP * (plan.block_m + plan.block_n * halves)
    return used + 1024 <= _SHARED_BYTES


def _few_rows(num_rows: int, *, silu_mul: bool) -> Iterator[Fp8Plan]:
    """Up to 64 rows: the weight is read once, so the depth of the pipeline decides."""
    block_m = max(16, 1 << (num_rows - 1).bit_length())
    streamed = max(8, 1 << (num_rows - 1).bit_length())
    for stages in (1, 2, 3, 4, 6) if streamed <= 16 else (1, 2, 3):
        if streamed < 64 or not silu_mul:
            yield Fp8Plan(kind="stream", block_m=streamed, num_stages=stages)
    for block_n, stages in ((64, 6), (64, 12), (128, 6)):
        yield Fp8Plan(block_m=block_m, block_n=block_n, num_stages=stages, swap=True, evict_first=True)
    for block_n, stages in ((64, 12), (128, 6)):
        yield Fp8Plan(kind="tma", block_m=block_m, block_n=block_n, num_stages=stages, swap=True, persistent=False)


def rings(*, silu_mul: bool) -> Iterator[Fp8Plan]:
    """Depths of the rings beside the buffers of the result, and how far the consumers are apart."""
    two_halves = ((9, 4, 4, 8), (9, 4, 4, 16), (9, 4, 6, 16), (9, 4, 0, 16), (8, 5, 3, 16), (9, 4, 4, 32))
    one_half = ((6, 6, 2, 8), (6, 6, 2, 16), (7, 6, 3, 8), (6, 6, 0, 8))
    for block_n, depths in ((128, two_halves),) if silu_mul else ((256, two_halves), (128, one_half)):
        for num_stages, x_stages, lead, group_m in depths:
            yield Fp8Plan(
                kind="rings", block_m=128, block_n=block_n, num_stages=num_stages, x_stages=x_stages, lead=lead,
                store_parts=2, group_m=group_m,
            )  # fmt: skip


def _many_rows(num_rows: int, *, silu_mul: bool) -> Iterator[Fp8Plan]:
    """Above 64 rows: arithmetic decides, then the shape of the last wave of tiles."""
    if num_rows > 64:
        yield from rings(silu_mul=silu_mul)
    tiles = ((128, 128, 8, 4), (64, 128, 4, 5), (128, 64, 8, 6), (64, 64, 4, 8), (64, 256, 8, 3))
    for block_m, block_n, warps, stages in tiles:
        if block_m > max(64, num_rows):
            continue
        width = block_n // 2 if silu_mul else block_n
        for persistent in (True, False) if num_rows >= 512 else (False,):
            yield Fp8Plan(
                kind="tma", block_m=block_m, block_n=max(64, width), num_warps=warps, num_stages=stages,
                persistent=persistent,
            )  # fmt: skip
    if num_rows <= 256:
        for block_m, block_n, stages in ((64, 128, 5), (128, 64, 6), (128, 128, 4)):
            yield Fp8Plan(
                kind="tma", block_m=block_m, block_n=block_n, num_warps=4 if block_n == 64 else 8, num_stages=stages,
                swap=True, persistent=False,
            )  # fmt: skip


def candidates(num_rows: int, *, silu_mul: bool) -> list[Fp8Plan]:
    """Every plan of ours to measure for a row count, each once."""
    plans: list[Fp8Plan] = []
    if num_rows <= 64:
        plans += _few_rows(num_rows, silu_mul=silu_mul)
    if num_rows >= 64:
        plans += _many_rows(num_rows, silu_mul=silu_mul)
    return [plan for plan in dict.fromkeys(plans) if _fits(plan, silu_mul=silu_mul)]
