"""GEMM `y = x Wᵀ` as one fp32 chain over K per output element.

Shape legend: M rows of x, N output features, K input features, F = N of a gate/up half.

Every tile shape, warp count, pipeline depth and operand order gives the same bits (each candidate is
admitted by measurement, not by this sentence): the tensor core adds K in ascending steps of 16 into
one accumulator, wherever the tile lies. So the choice is free and is made for speed alone. Nothing
here splits K, and nothing may.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def _sigmoid_weighted(x):
    """silu(x) = x / (1 + exp(-x)), the same division and exponential in every epilogue."""
    return tl.math.div_rn(x, 1.0 + tl.exp(-x))


@triton.jit
def _tile_of(index, num_m_tiles, num_n_tiles, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M row tiles, so that neighbours in time share weights in L2."""
    group_size = GROUP_M * num_n_tiles
    first_m = (index // group_size) * GROUP_M
    rows_in_group = tl.minimum(num_m_tiles - first_m, GROUP_M)
    tile_m = first_m + (index % group_size) % rows_in_group
    tile_n = (index % group_size) // rows_in_group
    return tile_m, tile_n


@triton.jit
def _finish(acc, up, bias_ptr, offs_n, N, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, SILU_MUL: tl.constexpr):
    """fp32 epilogue on one accumulator tile, rows of x along axis 1 when SWAP."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        if SWAP:
            acc = acc + bias[:, None]
        else:
            acc = acc + bias[None, :]
    if SILU_MUL:
        acc = _sigmoid_weighted(acc) * up
    return acc


@triton.jit(do_not_specialize=["M"])
def chain_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One output tile per program, loads through pointers. SILU_MUL: W holds 2N rows, [gate; up].

    SWAP computes (W xᵀ) so that few rows of x fill the narrow side of the tensor core instruction.
    Rows and columns past the end wrap around instead of being masked: their results are not stored.
    """
    begin(PDL)
    num_m_tiles = tl.cdiv(M, BLOCK_M)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = _tile_of(tl.program_id(0), num_m_tiles, num_n_tiles, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (offs_m % M).to(tl.int64) * stride_x
    w_rows = w_ptr + (offs_n % N).to(tl.int64) * stride_w
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        cols = k + offs_k
        if SWAP:
            x_ptrs = x_rows[None, :] + cols[:, None]
            w_ptrs = w_rows[:, None] + cols[None, :]
        else:
            x_ptrs = x_rows[:, None] + cols[None, :]
            w_ptrs = w_rows[None, :] + cols[:, None]
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, eviction_policy=policy)
        else:
            in_k = cols < K
            x_mask = in_k[:, None] if SWAP else in_k[None, :]
            w_mask = in_k[None, :] if SWAP else in_k[:, None]
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy=policy)
        if SWAP:
            acc = tl.dot(w, x, acc)
        else:
            acc = tl.dot(x, w, acc)
        if SILU_MUL:
            up_ptrs = w_ptrs + tl.cast(N, tl.int64) * stride_w
            if EVEN_K:
                w_up = tl.load(up_ptrs, eviction_policy=policy)
            else:
                w_up = tl.load(up_ptrs, mask=w_mask, other=0.0, eviction_policy=policy)
            if SWAP:
                up = tl.dot(w_up, x, up)
            else:
                up = tl.dot(x, w_up, up)
    y = _finish(acc, up, bias_ptr, offs_n, N, SWAP, HAS_BIAS, SILU_MUL)
    out_rows = out_ptr + offs_m.to(tl.int64) * stride_out
    if SWAP:
        y = tl.trans(y)
    keep = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_rows[:, None] + offs_n[None, :], y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _halves(y):
    """Left and right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M"])
def tma_kernel(
    x_desc,
    w_desc,
    out_desc,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    STORE_PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Persistent programs; tiles come and go through the bulk tensor copy engine.

    Edges need no masks: the engine reads zeros and drops stores past the end. STORE_PARTS (1, 2
    or 4) stores a tile in parts of its columns, which divides the shared memory the store needs.
    """
    begin(PDL)
    num_m_tiles = tl.cdiv(M, BLOCK_M)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0),
        num_m_tiles * num_n_tiles,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            w = w_desc.load([column, k])
            if SWAP:
                acc = tl.dot(w, x.T, acc)
            else:
                acc = tl.dot(x, w.T, acc)
            if SILU_MUL:
                w_up = w_desc.load([N + column, k])
                if SWAP:
                    up = tl.dot(w_up, x.T, up)
                else:
                    up = tl.dot(x, w_up.T, up)
        y = _finish(acc, up, bias_ptr, column + tl.arange(0, BLOCK_N), N, SWAP, HAS_BIAS, SILU_MUL)
        if SWAP:
            y = tl.trans(y)
        if STORE_PARTS == 1:
            out_desc.store([row, column], y.to(OUT_DTYPE))
        else:
            left, right = _halves(y)
            if STORE_PARTS == 2:
                out_desc.store([row, column], left.to(OUT_DTYPE))
                out_desc.store([row, column + BLOCK_N // 2], right.to(OUT_DTYPE))
            else:
                first, second = _halves(left)
                third, fourth = _halves(right)
                out_desc.store([row, column], first.to(OUT_DTYPE))
                out_desc.store([row, column + BLOCK_N // 4], second.to(OUT_DTYPE))
                out_desc.store([row, column + BLOCK_N // 2], third.to(OUT_DTYPE))
                out_desc.store([row, column + BLOCK_N // 4 * 3], fourth.to(OUT_DTYPE))
