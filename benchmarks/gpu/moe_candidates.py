"""Plans of the experts' GEMMs worth trying, by regime of rows. Shared memory of a block is 227 KiB."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cluster.engine.kernels.triton.moe_plans import GroupedPlan, Kind, MoePlan, MoeShape

_SHARED_BYTES = 227 * 1024


def tilings(shape: MoeShape, num_rows: int) -> list[tuple[Kind, int]]:
    """(kind, rows of a tile) for a step: not grouped for few rows, else tiles around the rows an expert gets."""
    if num_rows <= 16:
        return [("few", 16)]
    if num_rows <= 64:
        return [("few", 32 if num_rows <= 32 else 64), ("grouped", 16)]
    rows_per_expert = num_rows * shape.top_k / shape.num_experts
    if rows_per_expert <= 12:
        return [("grouped", 16), ("grouped", 32)]
    if rows_per_expert <= 48:
        return [("grouped", 32), ("grouped", 64)]
    return [("grouped", 64), ("grouped", 128)] if rows_per_expert <= 160 else [("grouped", 128)]


def gemm_plans(kind: Kind, block_m: int, in_features: int, *, silu_mul: bool) -> list[GroupedPlan]:
    """What to try for one GEMM of a tiling."""
    if kind == "few":
        found = _narrow(block_m, tma=False)
    elif block_m <= 64:
        found = [*_narrow(block_m, tma=False), *_narrow(block_m, tma=True)]
    else:
        found = []
    if kind == "grouped" and block_m >= 64:
        found += _wide(block_m, silu_mul=silu_mul)
    fitted = [_fitted(plan, block_m, in_features, silu_mul=silu_mul) for plan in found]
    return [plan for plan in dict.fromkeys(fitted) if plan.num_stages >= 2]


def _narrow(block_m: int, *, tma: bool) -> list[GroupedPlan]:
    """Few rows in a tile: weights on the wide side of the instruction, and deep pipelines."""
    tiles = ((64, 128, 5, 4), (32, 128, 6, 4), (32, 256, 4, 4), (64, 256, 3, 4), (128, 64, 5, 4), (128, 128, 3, 4))
    return [
        GroupedPlan(block_n=n, block_k=k, num_stages=stages, num_warps=warps, evict_first=not tma, tma=tma)
        for n, k, stages, warps in (tiles[0], tiles[4], tiles[5]) * tma or tiles
    ]


def _wide(block_m: int, *, silu_mul: bool) -> list[GroupedPlan]:
    """Many rows in a tile: arithmetic decides. With both halves of gate_up a program has twice the columns."""
    shapes: tuple[tuple[int, int, int, int], ...] = ((128, 64, 3, 8), (128, 64, 4, 8), (64, 64, 5, 4))
    if not silu_mul:
        shapes = ((256, 64, 3, 8), (128, 64, 4, 8), (128, 64, 4, 4))
    plans = []
    for n, k, stages, warps in shapes:
        for persistent, group_m in ((False, 4), (True, 8)):
            plans.append(
                GroupedPlan(
                    block_n=n, block_k=k, num_stages=stages, num_warps=4 if block_m == 64 else warps, swap=False,
                    evict_first=False, tma=True, persistent=persistent, group_m=group_m,
                )
            )  # fmt: skip
    return plans


def _fitted(plan: GroupedPlan, block_m: int, in_features: int, *, silu_mul: bool) -> GroupedPlan:
    """With no more stages than there are steps of K and shared memory for."""
    columns = plan.block_n * (2 if silu_mul else 1)
    room = _SHARED_BYTES // ((block_m + columns) * plan.block_k * 2)
    return msgspec.structs.replace(plan, num_stages=min(plan.num_stages, room, -(-in_features // plan.block_k)))


def whole_plans(shape: MoeShape, num_rows: int) -> Iterator[MoePlan]:
    """Each GEMM plan of each tiling once, in pairs: what admission compares."""
    for kind, block_m in tilings(shape, num_rows):
        gate_up = gemm_plans(kind, block_m, shape.hidden, silu_mul=True)
        down = gemm_plans(kind, block_m, shape.features, silu_mul=False)
        for index in range(max(len(gate_up), len(down))):
            yield MoePlan(
                kind=kind,
                block_m=block_m,
                gate_up=gate_up[index % len(gate_up)],
                down=down[index % len(down)],
            )
