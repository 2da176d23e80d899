"""Of latent attention: the row that is cached (norm, rotation, store) and the queries (rotation, rounding).

Shape legend: T rows, H query heads, U and R a query head's parts without and with rotation, L latent size, S
tokens in a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.attention import pair_sums
from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def _square_sum(x, LEVELS: tl.constexpr):
    """(n,) -> (1,): neighbours first, as a binary tree, so that no layout decides the order. n = 2^LEVELS."""
    left, right = tl.split(tl.reshape(x, (1, 1, x.shape[0] // 2, 2)))
    sums = tl.fma(left, left, right * right)
    for _ in tl.static_range(LEVELS - 1):
        sums = pair_sums(sums)
    return tl.reshape(sums, (1,))


@triton.jit
def _turn(low, high, cos, sin):
    return tl.fma(low, cos, -(high * sin)), tl.fma(high, cos, low * sin)


@triton.jit
def latent_rope_kernel(
    q_ptr, row_ptr, kv_ptr, q_nope_ptr, q_rope_ptr, norm_ptr, cos_sin_ptr, positions_ptr, slot_ptr,
    stride_q, stride_row, stride_block, norm_eps,
    NUM_HEADS: tl.constexpr, U: tl.constexpr, BLOCK_U: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr,
    LEVELS: tl.constexpr, R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Programs (row, 0) make the row that is cached, programs (row, 1 ...) HEADS queries each."""
    begin(PDL)
    HALF: tl.constexpr = R // 2
    t = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_HALF)
    in_half = offs < HALF
    angles = cos_sin_ptr + tl.load(positions_ptr + t) * R + offs
    cos = tl.load(angles, mask=in_half, other=0.0)
    sin = tl.load(angles + HALF, mask=in_half, other=0.0)
    if tl.program_id(1) == 0:
        slot = tl.load(slot_ptr + t)
        if slot >= 0:
            cached = kv_ptr + (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * (L + R)
            row = row_ptr + t * stride_row
            offs_l = tl.arange(0, BLOCK_L)
            x = tl.load(row + offs_l, mask=offs_l < L, other=0.0)
            mean_square = _square_sum(x, LEVELS) * (1.0 / L)
            scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + norm_eps))
            weight = tl.load(norm_ptr + offs_l, mask=offs_l < L, other=0.0)
            y = x * tl.broadcast_to(scale, x.shape) * weight
            tl.store(cached + offs_l, y.to(kv_ptr.dtype.element_ty), mask=offs_l < L)
            key_low = tl.load(row + L + offs, mask=in_half, other=0.0)
            key_high = tl.load(row + L + HALF + offs, mask=in_half, other=0.0)
            turned_low, turned_high = _turn(key_low, key_high, cos, sin)
            tl.store(cached + L + offs, turned_low.to(kv_ptr.dtype.element_ty), mask=in_half)
            tl.store(cached + L + HALF + offs, turned_high.to(kv_ptr.dtype.element_ty), mask=in_half)
    else:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)
        source = q_ptr + t * stride_q + (head * (U + R))[:, None]
        offs_u = tl.arange(0, BLOCK_U)
        keep = (head < NUM_HEADS)[:, None] & (offs_u < U)[None, :]
        q = tl.load(source + offs_u[None, :], mask=keep, other=0.0)
        target = q_nope_ptr + ((t * NUM_HEADS + head) * U)[:, None] + offs_u[None, :]
        tl.store(target, q.to(q_nope_ptr.dtype.element_ty), mask=keep)
        keep = (head < NUM_HEADS)[:, None] & in_half[None, :]
        low = tl.load(source + U + offs[None, :], mask=keep, other=0.0)
        high = tl.load(source + U + HALF + offs[None, :], mask=keep, other=0.0)
        cos_each = tl.broadcast_to(cos[None, :], low.shape)
        sin_each = tl.broadcast_to(sin[None, :], low.shape)
        low_each, high_each = _turn(low, high, cos_each, sin_each)
        target = q_rope_ptr + ((t * NUM_HEADS + head) * R)[:, None] + offs[None, :]
        tl.store(target, low_each.to(q_rope_ptr.dtype.element_ty), mask=keep)
        tl.store(target + HALF, high_each.to(q_rope_ptr.dtype.element_ty), mask=keep)
