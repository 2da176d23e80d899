"""Per-head RMSNorm (if the model has it), rotary embedding, and the write of K and V to the paged cache.

Shape legend: T rows, H query heads, G KV heads, D head size, S tokens in a block.

A "pair" is one (row, head) of the H + 2G heads of qkv. Programs take a fixed number of pairs in tiles
of a fixed shape, so the order of the per-head sum does not depend on T, nor on how many heads a rank
holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def _inverse_rms(low, high, eps, D: tl.constexpr):
    square_sum = tl.sum(tl.fma(low, low, high * high), axis=1)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(square_sum * (1.0 / D) + eps))


@triton.jit(do_not_specialize=["num_pairs"])
def rope_cache_kernel(
    qkv_ptr,
    q_out_ptr,
    kv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slot_ptr,
    q_norm_ptr,
    k_norm_ptr,
    num_pairs,
    stride_qkv,
    stride_block,
    stride_kv,
    stride_head,
    norm_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    NUM_ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    HALF: tl.constexpr = D // 2
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    valid = pair < num_pairs
    row = pair // NUM_ALL
    head = pair % NUM_ALL
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    offs = tl.arange(0, BLOCK_HALF)
    keep = valid[:, None] & (offs < HALF)[None, :]

    source = qkv_ptr + row.to(tl.int64)[:, None] * stride_qkv + (head * D)[:, None] + offs[None, :]
    low = tl.load(source, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=keep, other=0.0).to(tl.float32)
    value_low = low
    value_high = high
    if HAS_NORM:
        in_half = offs < HALF
        q_low = tl.load(q_norm_ptr + offs, mask=in_half, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm_ptr + HALF + offs, mask=in_half, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm_ptr + offs, mask=in_half, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm_ptr + HALF + offs, mask=in_half, other=0.0).to(tl.float32)
        scale = _inverse_rms(low, high, norm_eps, D)[:, None]
        low = low * scale * tl.where(is_query[:, None], q_low[None, :], k_low[None, :])
        high = high * scale * tl.where(is_query[:, None], q_high[None, :], k_high[None, :])

    position = tl.load(positions_ptr + row, mask=valid, other=0)
    angles = cos_sin_ptr + position.to(tl.int64)[:, None] * D + offs[None, :]
    cos = tl.load(angles, mask=keep, other=0.0)
    sin = tl.load(angles + HALF, mask=keep, other=0.0)
    turned_low = tl.fma(low, cos, -(high * sin))
    turned_high = tl.fma(high, cos, low * sin)
    turned_low = tl.where(is_value[:, None], value_low, turned_low)
    turned_high = tl.where(is_value[:, None], value_high, turned_high)

    q_target = q_out_ptr + (row.to(tl.int64) * NUM_HEADS + head)[:, None] * D + offs[None, :]
    q_keep = keep & is_query[:, None]
    tl.store(q_target, turned_low.to(q_out_ptr.dtype.element_ty), mask=q_keep)
    tl.store(q_target + HALF, turned_high.to(q_out_ptr.dtype.element_ty), mask=q_keep)

    slot = tl.load(slot_ptr + row, mask=valid, other=-1)
    stored = valid & (slot >= 0) & (head >= NUM_HEADS)
    slot = tl.maximum(slot, 0).to(tl.int64)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    place = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * D
    place += tl.where(is_value, stride_kv, 0) + kv_head * stride_head
    kv_target = kv_ptr + place[:, None] + offs[None, :]
    kv_keep = stored[:, None] & (offs < HALF)[None, :]
    tl.store(kv_target, turned_low.to(kv_ptr.dtype.element_ty), mask=kv_keep)
    tl.store(kv_target + HALF, turned_high.to(kv_ptr.dtype.element_ty), mask=kv_keep)
