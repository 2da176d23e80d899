"""The FP8 product of `fp8_linear.py` for many rows, written for Hopper's warp groups: same definition, same bits.

One producer warp fills a ring through the bulk copy engine; two consumer warp groups take 64 rows of the tile
each. While one group adds its sums in fp32, the other one has the tensor core to itself, so the additions
that the canonical order asks for every 128 features cost next to nothing. Neither waits for the other; they
drift apart by up to the depth of the ring, and the store of a tile hides behind the other group's products.

Written in Gluon, which leaves layouts and waits to the author.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from cluster.engine.kernels.triton.gluon_math import rounded_to_bf16, sigmoid_weighted
from cluster.engine.kernels.triton.gluon_names import async_load, barrier


@gluon.jit
def _tile_of(index, num_m_tiles, num_n_tiles, GROUP_M: gl.constexpr):
    """`linear._tile_of`."""
    group_size = GROUP_M * num_n_tiles
    first_m = (index // group_size) * GROUP_M
    rows_in_group = gl.minimum(num_m_tiles - first_m, GROUP_M)
    return first_m + (index % group_size) % rows_in_group, (index % group_size) // rows_in_group


@gluon.jit
def silu_mul(gate, up):
    """`fp8_linear.silu_mul`."""
    return sigmoid_weighted(rounded_to_bf16(gate)) * rounded_to_bf16(up)


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, ready, free, M, N, num_groups, BLOCK_N: gl.constexpr, GROUP_K: gl.constexpr,
    GROUP_M: gl.constexpr, HALVES: gl.constexpr, SILU_MUL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring, tile after tile; a stage is reused when both consumers have freed it."""
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    index = 0
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * 128
        column = tile_n * BLOCK_N
        second = column + 128
        if SILU_MUL:
            second = column + N
        for group in range(num_groups):
            stage = index % STAGES
            mbarrier.wait(free.index(stage), (index // STAGES + 1) & 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (2 * 64 + HALVES * 128) * GROUP_K)
            k = group * GROUP_K
            async_load(x_desc, [row, k], bar, x_ring.index(2 * stage))
            async_load(x_desc, [row + 64, k], bar, x_ring.index(2 * stage + 1))
            async_load(w_desc, [column, k], bar, w_ring.index(HALVES * stage))
            if HALVES == 2:
                async_load(w_desc, [second, k], bar, w_ring.index(HALVES * stage + 1))
            index += 1


@gluon.jit
def _group_sum(x, w, zeros):
    """x wᵀ of one group, starting at zero."""
    token = warpgroup_mma(x, w.permute([1, 0]), zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[token])


@gluon.jit
def _add(acc, part, x_scale, w_scale_ptr, SCALE_ROWS: gl.constexpr):
    """One group's sum into the accumulator; its 128 outputs lie in one row of blocks, if there are blocks."""
    if SCALE_ROWS > 0:
        scale = gl.expand_dims(x_scale * gl.load(w_scale_ptr), 1) + gl.zeros_like(acc)
        acc = gl.fma(part, scale, acc)
    else:
        acc = acc + part
    return acc


@gluon.jit
def _scaled(acc, x_scale, w_scale_ptr, columns, N, SCALE_ROWS: gl.constexpr):
    """`fp8_linear._scaled`."""
    if SCALE_ROWS == 0:
        w_scale = gl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
        acc = (acc * gl.expand_dims(x_scale, 1)) * gl.expand_dims(w_scale, 0)
    return acc


@gluon.jit
def _with_bias(y, bias_ptr, columns, N, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        y = y + gl.expand_dims(gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32), 0)
    return y


@gluon.jit
def _consume(
    x_ring, w_ring, ready, free, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups, stride_x_scale,
    stride_out, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, HALVES: gl.constexpr,
    HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr, SCALE_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * 64 .. + 63 of each tile; 128 outputs at a time, so that sums and accumulators fit the registers."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    zeros = gl.zeros([64, 128], gl.float32, LAYOUT)
    index = 0
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        rows = tile_m * 128 + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        columns = tile_n * BLOCK_N + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
        x_scale_rows = x_scale_ptr + gl.minimum(rows, M - 1).to(gl.int64) * stride_x_scale
        w_scales = w_scale_ptr
        if SCALE_ROWS > 0:
            w_scales += tile_n * BLOCK_N // SCALE_ROWS * num_groups
        acc = zeros
        second = zeros
        for group in range(num_groups):
            stage = index % STAGES
            x_scale = None
            if SCALE_ROWS > 0:
                x_scale = gl.load(x_scale_rows + group)
            mbarrier.wait(ready.index(stage), (index // STAGES) & 1)
            x = x_ring.index(2 * stage + WHICH)
            part = _group_sum(x, w_ring.index(HALVES * stage), zeros)
            if HALVES == 2:
                acc = acc + part
                part = _group_sum(x, w_ring.index(HALVES * stage + 1), zeros)
            barrier()
            mbarrier.arrive(free.index(stage), count=1)
            if HALVES == 2:
                second = second + part
            else:
                acc = _add(acc, part, x_scale, w_scales + group, SCALE_ROWS)
            index += 1
        x_scale = gl.load(x_scale_rows)
        out_rows = gl.expand_dims(out_ptr + rows.to(gl.int64) * stride_out, 1)
        keep_rows = gl.expand_dims(rows < M, 1)
        y = _with_bias(_scaled(acc, x_scale, w_scale_ptr, columns, N, SCALE_ROWS), bias_ptr, columns, N, HAS_BIAS)
        if SILU_MUL:
            y = silu_mul(y, _scaled(second, x_scale, w_scale_ptr + N, columns, N, SCALE_ROWS))
        keep = keep_rows & gl.expand_dims(columns < N, 0)
        gl.store(out_rows + gl.expand_dims(columns, 0), y.to(out_ptr.dtype.element_ty), mask=keep)
        if HALVES == 2 and not SILU_MUL:
            columns += 128
            y = _scaled(second, x_scale, w_scale_ptr, columns, N, SCALE_ROWS)
            y = _with_bias(y, bias_ptr, columns, N, HAS_BIAS)
            keep = keep_rows & gl.expand_dims(columns < N, 0)
            gl.store(out_rows + gl.expand_dims(columns, 0), y.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["M"])
def fp8_hopper_kernel(
    x_desc, x_scale_ptr, w_desc, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups, stride_x_scale, stride_out,
    BLOCK_N: gl.constexpr, GROUP_K: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr,
    SILU_MUL: gl.constexpr, SCALE_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows and BLOCK_N outputs (128 or 256; 128 with SILU_MUL, whose W holds 2N rows), shared out
    among the programs. Boxes: 64 x 128 of x, 128 x 128 of W. Block scales (SCALE_ROWS 128) only where a tile
    has 128 rows of W: with more, the registers do not suffice."""
    gl.static_assert(SCALE_ROWS == 0 or (SCALE_ROWS == 128 and BLOCK_N == 128 and not SILU_MUL))
    gl.static_assert(BLOCK_N == 128 or not SILU_MUL)
    HALVES: gl.constexpr = 2 if SILU_MUL else BLOCK_N // 128
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, GROUP_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [HALVES * STAGES, 128, GROUP_K], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring, w_ring, ready, free, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups,
                    stride_x_scale, stride_out, gl.constexpr(0), BLOCK_N, GROUP_M, HALVES, HAS_BIAS, SILU_MUL,
                    SCALE_ROWS, STAGES,
                ),
            ),
            (
                _consume,
                (
                    x_ring, w_ring, ready, free, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups,
                    stride_x_scale, stride_out, gl.constexpr(1), BLOCK_N, GROUP_M, HALVES, HAS_BIAS, SILU_MUL,
                    SCALE_ROWS, STAGES,
                ),
            ),
            (
                _produce,
                (
                    x_desc, w_desc, x_ring, w_ring, ready, free, M, N, num_groups, BLOCK_N, GROUP_K, GROUP_M,
                    HALVES, SILU_MUL, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
