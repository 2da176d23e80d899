"""FP8 GEMM `y = x Wᵀ`: e4m3 values, fp32 scales.

Shape legend: M rows of x, N output features, K input features (a multiple of 128), G = K / 128 groups.

The canonical order, whatever the tile: the products of each chain of groups of 128 along K (`fp8.CHANNEL_CHAIN`
groups, one with block scales) are summed by `wgmma` into an accumulator that starts at zero, and these sums are
added, ascending, in fp32. The tensor core keeps too few bits of an FP8 accumulator for all of K.

    CHANNEL   acc = acc + sum_c;                                       y = (acc * x_scale[m]) * w_scale[n]
    BLOCK     acc = fma(sum_g, x_scale[m, g] * w_scale[n / R, g], acc);                            y = acc

then the bias is added, and there is one rounding. With SwiGLU, gate and up are rounded to bf16 as two
separate layers would give them, and silu(gate) * up is computed in fp32 and rounded once.

No multiplication may fuse with the addition after it: launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.linear import _halves, _sigmoid_weighted, _tile_of


@triton.jit
def silu_mul(gate, up):
    """silu(gate) * up in fp32, of fp32 values that are first rounded to bf16."""
    return _sigmoid_weighted(gate.to(tl.bfloat16).to(tl.float32)) * up.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _block_scale(w_scale_ptr, row, group, num_groups, last, SCALE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scales of the tile's W rows from `row` on in one group: one number if they lie in one row of blocks."""
    if SCALE_ROWS % BLOCK_N == 0:
        block = row // SCALE_ROWS
    else:
        block = tl.minimum(row + tl.arange(0, BLOCK_N), last) // SCALE_ROWS
    return tl.load(w_scale_ptr + block * num_groups + group)


@triton.jit
def _over_tile(x_scale, w_scale, SWAP: tl.constexpr):
    """The scale of one group for a whole tile, or what broadcasts to it."""
    if len(w_scale.shape) == 0:
        scale = x_scale * w_scale
        tile = scale[None, :] if SWAP else scale[:, None]
    elif SWAP:
        tile = x_scale[None, :] * w_scale[:, None]
    else:
        tile = x_scale[:, None] * w_scale[None, :]
    return tile


@triton.jit
def _add_group(acc, x, w, x_scale, w_scale, SWAP: tl.constexpr, SCALE_ROWS: tl.constexpr, PROMOTE: tl.constexpr):
    """One group's sum into the accumulator. The scales are those of the group, and unused per channel."""
    if PROMOTE:
        if SWAP:
            part = tl.dot(w, x)
        else:
            part = tl.dot(x, w)
        if SCALE_ROWS > 0:
            acc = tl.fma(part, _over_tile(x_scale, w_scale, SWAP), acc)
        else:
            acc = acc + part
    elif SWAP:
        acc = tl.dot(w, x, acc)
    else:
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def _scaled(acc, x_scale, w_scale_ptr, offs_n, N, SWAP: tl.constexpr, SCALE_ROWS: tl.constexpr):
    """Per-row and per-channel scales; those of blocks are in the accumulator already."""
    if SCALE_ROWS == 0:
        w_scale = tl.load(w_scale_ptr + offs_n, mask=offs_n < N, other=0.0)
        if SWAP:
            acc = (acc * x_scale[None, :]) * w_scale[:, None]
        else:
            acc = (acc * x_scale[:, None]) * w_scale[None, :]
    return acc


@triton.jit
def _finish(
    acc, up, x_scale_rows, w_scale_ptr, bias_ptr, offs_n, N, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr, SCALE_ROWS: tl.constexpr,
):  # fmt: skip
    """The fp32 result of one tile, before its rounding; rows of x along axis 1 when SWAP."""
    x_scale = tl.load(x_scale_rows)
    y = _scaled(acc, x_scale, w_scale_ptr, offs_n, N, SWAP, SCALE_ROWS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        if SWAP:
            y = y + bias[:, None]
        else:
            y = y + bias[None, :]
    if SILU_MUL:
        y = silu_mul(y, _scaled(up, x_scale, w_scale_ptr + N, offs_n, N, SWAP, SCALE_ROWS))
    return y


@triton.jit(do_not_specialize=["M"])
def fp8_chain_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, K,
    stride_x, stride_x_scale, stride_w, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, EVICT_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, SILU_MUL: tl.constexpr,
    SCALE_ROWS: tl.constexpr, PROMOTE: tl.constexpr, FILL_UP: tl.constexpr,
):  # fmt: skip
    """One output tile per program, loads through pointers. SILU_MUL: W holds 2N rows, [gate; up].

    SCALE_ROWS: rows of W that share a block scale; 0: one scale per row of W and of x. GROUP_K is 128, or a chain of
    such groups, the last of which FILL_UP fills up with zeros.
    PROMOTE False leaves the accumulator in the tensor core from 0 to K: not the canonical order, here to
    be measured. Rows and columns past the end wrap around: their results are not stored.
    """
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, GROUP_K)
    rows_m = offs_m % M
    x_rows = x_ptr + rows_m.to(tl.int64) * stride_x
    w_rows = w_ptr + (offs_n % N).to(tl.int64) * stride_w
    x_scale_rows = x_scale_ptr + rows_m.to(tl.int64) * stride_x_scale
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if SWAP:
        x_ptrs = x_rows[None, :] + offs_k[:, None]
        w_ptrs = w_rows[:, None] + offs_k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        x_ptrs = x_rows[:, None] + offs_k[None, :]
        w_ptrs = w_rows[None, :] + offs_k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = acc
    num_groups = K // GROUP_K
    if FILL_UP:
        num_groups += 1
    for group in range(num_groups):
        x_scale, w_scale, up_scale = None, None, None
        if SCALE_ROWS > 0:
            x_scale = tl.load(x_scale_rows + group)
            column = tile_n * BLOCK_N
            w_scale = _block_scale(w_scale_ptr, column, group, K // GROUP_K, N - 1, SCALE_ROWS, BLOCK_N)
            if SILU_MUL:
                up_scale = _block_scale(w_scale_ptr, column + N, group, K // GROUP_K, 2 * N - 1, SCALE_ROWS, BLOCK_N)
        x_exists, w_exists, other = None, None, None
        if FILL_UP:
            exists = offs_k < K - group * GROUP_K
            x_exists, w_exists, other = exists[None, :], exists[:, None], 0.0
            if SWAP:
                x_exists, w_exists = exists[:, None], exists[None, :]
        x = tl.load(x_ptrs + group * GROUP_K, mask=x_exists, other=other)
        w = tl.load(w_ptrs + group * GROUP_K, mask=w_exists, other=other, eviction_policy=policy)
        acc = _add_group(acc, x, w, x_scale, w_scale, SWAP, SCALE_ROWS, PROMOTE)
        if SILU_MUL:
            up_ptrs = w_ptrs + (tl.cast(N, tl.int64) * stride_w + group * GROUP_K)
            w_up = tl.load(up_ptrs, mask=w_exists, other=other, eviction_policy=policy)
            up = _add_group(up, x, w_up, x_scale, up_scale, SWAP, SCALE_ROWS, PROMOTE)
    y = _finish(acc, up, x_scale_rows, w_scale_ptr, bias_ptr, offs_n, N, SWAP, HAS_BIAS, SILU_MUL, SCALE_ROWS)
    if SWAP:
        y = tl.trans(y)
    out_rows = out_ptr + offs_m.to(tl.int64) * stride_out
    keep = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_rows[:, None] + offs_n[None, :], y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M"])
def fp8_tma_kernel(
    x_desc, x_scale_ptr, w_desc, w_scale_ptr, bias_ptr, out_desc, M, N, K, stride_x_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, STORE_PARTS: tl.constexpr, FLATTEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SILU_MUL: tl.constexpr, SCALE_ROWS: tl.constexpr, PROMOTE: tl.constexpr, OUT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Persistent programs; tiles come and go through the bulk tensor copy engine, which reads zeros and
    drops stores past the end. STORE_PARTS (1, 2 or 4): a tile is stored in that many parts of its columns."""
    num_m_tiles = tl.cdiv(M, BLOCK_M)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m_tiles * num_n_tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        offs_n = column + tl.arange(0, BLOCK_N)
        x_scale_rows = x_scale_ptr + ((row + tl.arange(0, BLOCK_M)) % M).to(tl.int64) * stride_x_scale
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = acc
        for group in range(K // GROUP_K):
            x_scale, w_scale, up_scale = None, None, None
            if SCALE_ROWS > 0:
                x_scale = tl.load(x_scale_rows + group)
                w_scale = _block_scale(w_scale_ptr, column, group, K // GROUP_K, N - 1, SCALE_ROWS, BLOCK_N)
                if SILU_MUL:
                    up_scale = _block_scale(
                        w_scale_ptr, column + N, group, K // GROUP_K, 2 * N - 1, SCALE_ROWS, BLOCK_N
                    )
            x = x_desc.load([row, group * GROUP_K])
            w = w_desc.load([column, group * GROUP_K])
            if SWAP:
                x = x.T
            else:
                w = w.T
            acc = _add_group(acc, x, w, x_scale, w_scale, SWAP, SCALE_ROWS, PROMOTE)
            if SILU_MUL:
                w_up = w_desc.load([N + column, group * GROUP_K])
                if not SWAP:
                    w_up = w_up.T
                up = _add_group(up, x, w_up, x_scale, up_scale, SWAP, SCALE_ROWS, PROMOTE)
        y = _finish(acc, up, x_scale_rows, w_scale_ptr, bias_ptr, offs_n, N, SWAP, HAS_BIAS, SILU_MUL, SCALE_ROWS)
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
