"""Starts the kernels of latent attention: checks shapes, picks grids, owns no state (as `launch.py`)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention, attention_launch, heads, latent, latent_rope
from cluster.engine.kernels.triton.attention_launch import WorkLists
from cluster.engine.kernels.triton.launch import aligned
from cluster.engine.kernels.triton.overlap import overlap
from cluster.engine.kernels.triton.plans import SPLIT_KEYS, LatentPlan, LinearPlan

BLOCK_KV = 64  # keys per online-softmax block; part of the canonical order


def run_head_linear(x_THK: torch.Tensor, w_HNK: torch.Tensor, plan: LinearPlan, *, pdl: int = 0) -> torch.Tensor:
    """(T, H, N) in x's type. `plan`: one for a chain."""
    num_rows, num_heads, in_features = x_THK.shape
    if w_HNK.shape[0] != num_heads or w_HNK.shape[2] != in_features:
        raise ValueError(f"rows of {num_heads} x {in_features} do not fit weights of shape {tuple(w_HNK.shape)}")
    out_features = w_HNK.shape[1]
    out = torch.empty((num_rows, num_heads, out_features), dtype=x_THK.dtype, device=x_THK.device)
    if num_rows == 0:
        return out
    x_THK = aligned(x_THK)
    tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, plan.block_n)
    heads.head_chain_kernel[(tiles, num_heads)](
        x_THK, w_HNK, out, num_rows, out_features, in_features, x_THK.stride(0), out.stride(0),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m, SWAP=plan.swap,
        EVEN_K=in_features % plan.block_k == 0, EVICT_FIRST=plan.evict_first, num_warps=plan.num_warps,
        num_stages=plan.num_stages, **overlap(pdl),
    )  # fmt: skip
    return out


def run_latent_rope_and_cache(
    q_TC: torch.Tensor,
    row_TD: torch.Tensor,
    kv_N11SD: torch.Tensor,
    metadata: AttentionMetadata,
    cos_sin_PR: torch.Tensor,
    num_heads: int,
    norm_L: torch.Tensor,
    norm_eps: float,
    *,
    pdl: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, row_size = row_TD.shape
    latent_size, rope_size = norm_L.shape[0], cos_sin_PR.shape[1]
    if row_size != latent_size + rope_size or row_size != kv_N11SD.shape[4]:
        raise ValueError(f"rows of {row_size} are not {latent_size} + {rope_size}, or not {kv_N11SD.shape[4]}")
    nope_size = q_TC.shape[1] // num_heads - rope_size
    if nope_size <= 0 or q_TC.shape[1] != num_heads * (nope_size + rope_size):
        raise ValueError(f"queries of {q_TC.shape[1]} columns are not {num_heads} heads with {rope_size} rotated")
    shape, dtype, device = (num_rows, num_heads), kv_N11SD.dtype, q_TC.device
    q_nope = torch.empty((*shape, nope_size), dtype=dtype, device=device)
    q_rope = torch.empty((*shape, rope_size), dtype=dtype, device=device)
    if num_rows:
        q_TC, row_TD = (x if x.stride(1) == 1 else x.contiguous() for x in (q_TC, row_TD))
        block_l, per_program = triton.next_power_of_2(latent_size), min(16, triton.next_power_of_2(num_heads))
        latent_rope.latent_rope_kernel[(num_rows, 1 + triton.cdiv(num_heads, per_program))](
            q_TC, row_TD, kv_N11SD, q_nope, q_rope, norm_L, cos_sin_PR, metadata.positions, metadata.slot_mapping,
            q_TC.stride(0), row_TD.stride(0), kv_N11SD.stride(0), norm_eps, NUM_HEADS=num_heads, U=nope_size,
            BLOCK_U=triton.next_power_of_2(nope_size), L=latent_size, BLOCK_L=block_l,
            LEVELS=block_l.bit_length() - 1, R=rope_size, BLOCK_HALF=triton.next_power_of_2(rope_size // 2),
            BLOCK_SIZE=kv_N11SD.shape[3], HEADS=per_program, num_warps=4, **overlap(pdl),
        )  # fmt: skip
    return q_nope, q_rope


def run_latent_attention(
    q_THL: torch.Tensor,
    q_rope_THR: torch.Tensor,
    kv_N11SD: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    plan: LatentPlan,
    num_multiprocessors: int,
    out_dtype: torch.dtype | None = None,
    *,
    pdl: int = 0,
    lists: WorkLists | None = None,
) -> torch.Tensor:
    """(T, H, L) in q's type or the one given. `lists` keeps what all layers of a step share.

    Sequences of few rows take the split kernel, the others the tiled one: the same bits.
    """
    if q_THL.shape[2] + q_rope_THR.shape[2] != kv_N11SD.shape[4]:
        raise ValueError(
            f"queries of {q_THL.shape[2]} + {q_rope_THR.shape[2]} do not fit cached rows of {kv_N11SD.shape[4]}"
        )
    if scale <= 0:
        raise ValueError(f"the softmax scale must be positive, got {scale}")
    out = torch.empty(q_THL.shape, dtype=out_dtype or q_THL.dtype, device=q_THL.device)
    if len(q_THL) == 0:
        return out
    scale_log2 = scale / math.log(2.0)
    call = _Call(aligned(q_THL), aligned(q_rope_THR), kv_N11SD, metadata, out, scale_log2, pdl, lists or WorkLists())
    split_rows, tiled_above = paths(plan, metadata, call.num_heads)
    if split_rows:
        for part in attention_launch.in_parts(metadata, split_rows, None, *q_THL.shape[1:]):
            _run_split(replace(call, metadata=part), plan, split_rows, num_multiprocessors)
    if tiled_above is not None:
        _run_prefill(call, plan, tiled_above)
    return out


def paths(plan: LatentPlan, metadata: AttentionMetadata, num_heads: int) -> tuple[int, int | None]:
    """As `attention_launch.paths`."""
    return attention_launch.paths(plan, metadata, _group(num_heads, plan.split_block_rows))


@functools.cache  # asked for each layer of a step
def _group(num_heads: int, block_rows: int) -> int:
    """Heads of a tile: the most that fit and leave none over."""
    return max(count for count in range(1, min(num_heads, block_rows) + 1) if num_heads % count == 0)


@dataclass(frozen=True, slots=True)
class _Call:
    q_THL: torch.Tensor
    q_rope_THR: torch.Tensor
    kv_N11SD: torch.Tensor
    metadata: AttentionMetadata
    out: torch.Tensor
    scale_log2: float
    pdl: int
    lists: WorkLists

    @property
    def num_heads(self) -> int:
        return self.q_THL.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.metadata.context_len.shape[0]

    def group(self, block_rows: int) -> int:
        return _group(self.num_heads, block_rows)

    def constants(self, group: int, block_rows: int) -> dict[str, int]:
        latent_size, rope_size = self.q_THL.shape[2], self.q_rope_THR.shape[2]
        return {
            "NUM_GROUPS": self.num_heads // group,
            "GROUP": group,
            "L": latent_size,
            "BLOCK_L": max(32, triton.next_power_of_2(latent_size)),
            "R": rope_size,
            "BLOCK_R": max(16, triton.next_power_of_2(rope_size)),
            "BLOCK_ROWS": block_rows,
            "BLOCK_KV": BLOCK_KV,
            "SPLIT_KEYS": SPLIT_KEYS,
            "BLOCK_SIZE": self.kv_N11SD.shape[3],
        }

    @property
    def strides(self) -> tuple[int, ...]:
        """Of queries, rotated queries, result, block table, cache."""
        table, kv = self.metadata.block_table, self.kv_N11SD
        return self.q_THL.stride(0), self.q_rope_THR.stride(0), self.out.stride(0), table.stride(0), kv.stride(0)


def _run_split(call: _Call, plan: LatentPlan, max_rows: int, num_multiprocessors: int) -> None:
    """Serve the sequences with at most `max_rows` rows: partial results of all splits, then the fold."""
    metadata, device = call.metadata, call.out.device
    group = call.group(plan.split_block_rows)
    groups, latent_size = call.num_heads // group, call.q_THL.shape[2]
    block_rows = max(16, triton.next_power_of_2(max_rows * group))
    splits_each, splits = attention_launch.bound_of_splits(metadata, max_rows, None)
    items = splits * groups
    scratch = (items if splits_each > 1 else 1, max_rows * group)  # a single split needs no partial results
    partial = torch.empty((*scratch, latent_size), dtype=torch.float32, device=device)
    partial_m = torch.empty(scratch, dtype=torch.float32, device=device)
    partial_l = torch.empty((*scratch, 8), dtype=torch.float32, device=device)
    records, firsts = call.lists.splits(metadata, splits, max_rows, None)
    for value in _values(plan.split_halves):
        latent.latent_split_kernel[(min(items, num_multiprocessors * plan.split_programs_per_multiprocessor),)](
            call.q_THL, call.q_rope_THR, call.kv_N11SD, call.out, partial, partial_m, partial_l, records,
            firsts, metadata.block_table, call.num_sequences, max_rows, call.scale_log2, *call.strides,
            **call.constants(group, block_rows), VALUE=value, num_warps=plan.split_num_warps,
            num_stages=plan.split_num_stages, **overlap(call.pdl),
        )  # fmt: skip
    if splits_each <= 1:
        return
    attention.fold_kernel[(call.num_sequences, max_rows * call.num_heads)](
        call.out, partial, partial_m, partial_l, firsts, metadata.query_start, metadata.context_len, max_rows, None,
        call.out.stride(0), NUM_KV_HEADS=groups, GROUP=group, D=latent_size,
        BLOCK_D=triton.next_power_of_2(latent_size), SPLIT_KEYS=SPLIT_KEYS, num_warps=1, **overlap(call.pdl),
    )  # fmt: skip


def _run_prefill(call: _Call, plan: LatentPlan, max_rows: int) -> None:
    """Serve the sequences with more than `max_rows` rows."""
    metadata = call.metadata
    block_rows = plan.prefill_block_rows
    group = call.group(block_rows)
    rows_per_tile = block_rows // group
    num_tiles = metadata.num_tiles(len(call.q_THL), rows_per_tile, max_rows)
    tiles = call.lists.tiles(metadata, num_tiles, rows_per_tile, max_rows)
    for value in _values(plan.prefill_halves):
        latent.latent_prefill_kernel[(num_tiles, call.num_heads // group)](
            call.q_THL, call.q_rope_THR, call.kv_N11SD, call.out, tiles, metadata.block_table, call.scale_log2,
            *call.strides,
            **call.constants(group, block_rows), VALUE=value, num_warps=plan.prefill_num_warps,
            num_stages=plan.prefill_num_stages,
        )  # fmt: skip


def _values(halves: bool) -> tuple[int, ...]:
    """The launches that make a whole value."""
    return (1, 2) if halves else (0,)
