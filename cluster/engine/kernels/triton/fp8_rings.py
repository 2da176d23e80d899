"""The FP8 product of `fp8_linear.py` for many rows, written for Hopper's warp groups: same definition, same bits.

Two consumer warp groups take 64 rows of a tile each. Three producer warps fill rings through the bulk copy engine: one
of x for each consumer, one of W, which both read. A tile has 128 outputs or two halves of 128, with SwiGLU gate and up:
a chain of groups of the first half, the same of the second. A chain's sums meet the accumulators in registers, while
the other consumer has the tensor core.

- W lies in the ring in the order in which it is multiplied, 128 rows at a time, so that a buffer is free as soon as the
  product after its own is on the way. x is read by both halves and freed by the last.
- Results leave through shared memory and the copy engine, which reads them while the next tile is computed. Scales
  are asked for where a tile begins.
- The second consumer begins when the first one has freed LEAD buffers of W and stays about that much behind: while one
  adds its sums or ends a tile, the other one has products to do.

Barriers: `ready` of a buffer completes when its bytes are there, `free` when its consumer, or both for W, are past its
product; each once for every use, so one phase bit for each role is all the state. The first consumer takes LEAD buffers
without the second one, and the product after them to free the last: LEAD is less than W's stages.

Written in Gluon, which leaves layouts and waits to the author.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cluster.engine.kernels.triton.gluon_math import silu_mul
from cluster.engine.kernels.triton.gluon_names import async_load, barrier
from cluster.engine.kernels.triton.gluon_rings import next_stage
from cluster.engine.kernels.triton.linear_hopper import _store, _tile_of


@gluon.jit
def _produce_x(
    x_desc, ring, ready, free, M, N, num_groups, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    X_STAGES: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * 64 .. + 63 of each tile, into the ring of their consumer."""
    GROUP_K: gl.constexpr = x_desc.block_type.shape[1]
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        tile_m, _ = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * 128 + WHICH * 64
        for group in range(num_groups):
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(ready.index(stage), 64 * GROUP_K)
            async_load(x_desc, [row, group * GROUP_K], ready.index(stage), ring.index(stage))
            stage, phase = next_stage(stage, phase, X_STAGES)


@gluon.jit
def _produce_w(
    w_desc, ring, ready, free, M, N, num_groups, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, HALVES: gl.constexpr,
    SILU_MUL: gl.constexpr, W_STAGES: gl.constexpr, CHAIN: gl.constexpr,
):  # fmt: skip
    """128 rows of W at a time, in the order of the products: a chain of the first half, the same of the second, which
    are `up` with SwiGLU, the next 128 rows otherwise."""
    GROUP_K: gl.constexpr = w_desc.block_type.shape[1]
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        _, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        column = tile_n * BLOCK_N
        for group in range(0, num_groups, CHAIN):
            for half in gl.static_range(HALVES):
                row = column + half * (N if SILU_MUL else 128)
                for i in gl.static_range(CHAIN):
                    mbarrier.wait(free.index(stage), phase)
                    mbarrier.expect(ready.index(stage), 128 * GROUP_K)
                    async_load(w_desc, [row, (group + i) * GROUP_K], ready.index(stage), ring.index(stage))
                    stage, phase = next_stage(stage, phase, W_STAGES)


@gluon.jit
def _channel_scales(w_scale_ptr, column, N, SCALE_ROWS: gl.constexpr):
    """Of 128 outputs, one to a thread: asked for early, they cost one register until they are needed."""
    columns = column + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    scales = columns.to(gl.float32)
    if SCALE_ROWS == 0:
        scales = gl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
    return scales


@gluon.jit
def _scaled(acc, x_scale, w_scale, LAYOUT: gl.constexpr, SCALE_ROWS: gl.constexpr):
    """`fp8_linear._scaled`."""
    if SCALE_ROWS == 0:
        w_scale = gl.convert_layout(w_scale, gl.SliceLayout(0, LAYOUT))
        acc = (acc * gl.expand_dims(x_scale, 1)) * gl.expand_dims(w_scale, 0)
    return acc


@gluon.jit
def _with_bias(y, bias_ptr, columns, N, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        y = y + gl.expand_dims(gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32), 0)
    return y


@gluon.jit
def _again(value):
    """The same number, whose compiler does not know that it is the same: what follows from it is computed anew instead
    of being kept in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _now(sums):
    """The same sums, computed here: later, beside the second half's products, they would not fit the registers."""
    return gl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [sums], gl.float32, is_pure=False, pack=1)


@gluon.jit
def _free(
    x_free, w_free, ahead, x_stage, w_stage, is_x_free: gl.constexpr, LEADS: gl.constexpr, is_ahead,
):  # fmt: skip
    """All threads of a consumer are past a product: its buffers may be filled again."""
    barrier()
    mbarrier.arrive(w_free.index(w_stage), count=1)
    if is_x_free:
        mbarrier.arrive(x_free.index(x_stage), count=1)
    if LEADS:
        mbarrier.arrive(ahead.index(0), count=1, pred=is_ahead)


@gluon.jit
def _consume(
    x_ring, w_ring, x_ready, w_ready, x_free, w_free, ahead, x_scale_ptr, w_scale_ptr, bias_ptr, out_desc, buffer,
    M, N, num_groups, stride_x_scale, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    HALVES: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr, SCALE_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, LEAD: gl.constexpr, CHAIN: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * 64 .. + 63 of each tile; 128 outputs at a time, so that sums and accumulators fit the registers.
    A buffer is freed when the product after its own is on the way, x by the last half."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    LEADS: gl.constexpr = WHICH == 0 and LEAD > 0
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    zeros = gl.zeros([64, 128], gl.float32, LAYOUT)
    x_stage = 0
    x_phase = 0
    w_stage = 0
    w_phase = 0
    number = 1  # of the buffer of W that is freed next
    if WHICH == 1 and LEAD > 0:
        mbarrier.wait(ahead.index(0), 0)
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * 128 + WHICH * 64
        column = tile_n * BLOCK_N
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
        x_scale_rows = x_scale_ptr + gl.minimum(rows, M - 1).to(gl.int64) * stride_x_scale
        w_block_scales = w_scale_ptr
        if SCALE_ROWS > 0:
            w_block_scales += column // SCALE_ROWS * num_groups
        x_scale = gl.load(x_scale_rows)
        w_scale = _channel_scales(w_scale_ptr, column, N, SCALE_ROWS)
        if SILU_MUL:
            second_w_scale = _channel_scales(w_scale_ptr + N, column, N, SCALE_ROWS)
        else:
            second_w_scale = _channel_scales(w_scale_ptr, column + 128, N, SCALE_ROWS)
        acc = zeros
        second = zeros
        for group in range(0, num_groups, CHAIN):
            scale = x_scale
            if SCALE_ROWS > 0:
                scale = gl.load(x_scale_rows + group) * gl.load(w_block_scales + group)
            first_x_stage = x_stage
            first_x_phase = x_phase
            for half in gl.static_range(HALVES):
                x_stage = _again(first_x_stage)
                x_phase = first_x_phase
                w_stage = _again(w_stage)
                x_before = x_stage
                w_before = w_stage
                part = zeros
                for i in gl.static_range(CHAIN):
                    if half == 0:
                        mbarrier.wait(x_ready.index(x_stage), x_phase)
                    mbarrier.wait(w_ready.index(w_stage), w_phase)
                    w = w_ring.index(w_stage).permute([1, 0])
                    part = warpgroup_mma(x_ring.index(x_stage), w, part, use_acc=i > 0, is_async=True)
                    if i > 0:
                        part = warpgroup_mma_wait(1, deps=[part])
                        _free(x_free, w_free, ahead, x_before, w_before, half == HALVES - 1, LEADS, number == LEAD)
                        number += 1
                    w_before = w_stage
                    x_before = x_stage
                    x_stage, x_phase = next_stage(x_stage, x_phase, X_STAGES)
                    w_stage, w_phase = next_stage(w_stage, w_phase, W_STAGES)
                part = warpgroup_mma_wait(0, deps=[part])
                _free(x_free, w_free, ahead, x_before, w_before, half == HALVES - 1, LEADS, number == LEAD)
                number += 1
                if half == 1:
                    second = second + part
                elif SCALE_ROWS > 0:
                    acc = gl.fma(part, gl.expand_dims(scale, 1) + gl.zeros_like(acc), acc)
                else:
                    acc = acc + part
                    if HALVES == 2:
                        acc = _now(acc)
        y = _scaled(acc, x_scale, w_scale, LAYOUT, SCALE_ROWS)
        y = _with_bias(y, bias_ptr, columns, N, HAS_BIAS)
        if SILU_MUL:
            y = silu_mul(y, _scaled(second, x_scale, second_w_scale, LAYOUT, SCALE_ROWS))
        _store(y, bias_ptr, N, buffer, out_desc, row, column, False)
        if HALVES == 2 and not SILU_MUL:
            y = _scaled(second, x_scale, second_w_scale, LAYOUT, SCALE_ROWS)
            y = _with_bias(y, bias_ptr, columns + 128, N, HAS_BIAS)
            _store(y, bias_ptr, N, buffer, out_desc, row, column + 128, False)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def fp8_rings_kernel(
    x_desc, x_scale_ptr, w_desc, w_scale_ptr, bias_ptr, out_desc, M, N, num_groups, stride_x_scale,
    BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr,
    SCALE_ROWS: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, LEAD: gl.constexpr,
    CHAIN: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows and BLOCK_N outputs (128 or 256; 128 with SILU_MUL, whose W holds 2N rows), shared out among
    the programs, each of which has one at least. `num_groups` is a multiple of CHAIN, groups past the end of K read
    zeros; LEAD is at most that many. Boxes: 64 x 128 of x, 128 x 128 of W, 64 x a part (1, 2 or 4 to 128 columns) of
    the result. Block scales (SCALE_ROWS 128) only where a tile has 128 rows of W: with more, the registers do not
    suffice."""
    gl.static_assert(SCALE_ROWS == 0 or (SCALE_ROWS == 128 and BLOCK_N == 128 and not SILU_MUL))
    gl.static_assert(BLOCK_N == 128 or not SILU_MUL)
    gl.static_assert(CHAIN <= X_STAGES and (SCALE_ROWS == 0 or CHAIN == 1))
    gl.static_assert(LEAD < W_STAGES and (W_STAGES > 1 or CHAIN == 1))
    HALVES: gl.constexpr = 2 if SILU_MUL else BLOCK_N // 128
    GROUP_K: gl.constexpr = x_desc.block_type.shape[1]
    PART: gl.constexpr = out_desc.block_type.shape[1]
    x_ring_0 = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, 64, GROUP_K], x_desc.layout)
    x_ring_1 = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, 64, GROUP_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [W_STAGES, 128, GROUP_K], w_desc.layout)
    buffers = gl.allocate_shared_memory(out_desc.dtype, [2, 64, PART], out_desc.layout)
    x_ready_0 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_ready_1 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_free_0 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_free_1 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_ready = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_free = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready_0.index(stage), count=1)
        mbarrier.init(x_ready_1.index(stage), count=1)
        mbarrier.init(x_free_0.index(stage), count=1)
        mbarrier.init(x_free_1.index(stage), count=1)
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_ready.index(stage), count=1)
        mbarrier.init(w_free.index(stage), count=2)
    mbarrier.init(ahead.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring_0, w_ring, x_ready_0, w_ready, x_free_0, w_free, ahead, x_scale_ptr, w_scale_ptr, bias_ptr,
                    out_desc, buffers.index(0), M, N, num_groups, stride_x_scale, gl.constexpr(0), BLOCK_N, GROUP_M,
                    HALVES, HAS_BIAS, SILU_MUL, SCALE_ROWS, X_STAGES, W_STAGES, LEAD, CHAIN,
                ),
            ),
            (
                _consume,
                (
                    x_ring_1, w_ring, x_ready_1, w_ready, x_free_1, w_free, ahead, x_scale_ptr, w_scale_ptr, bias_ptr,
                    out_desc, buffers.index(1), M, N, num_groups, stride_x_scale, gl.constexpr(1), BLOCK_N, GROUP_M,
                    HALVES, HAS_BIAS, SILU_MUL, SCALE_ROWS, X_STAGES, W_STAGES, LEAD, CHAIN,
                ),
            ),
            (
                _produce_w,
                (
                    w_desc, w_ring, w_ready, w_free, M, N, num_groups, BLOCK_N, GROUP_M, HALVES, SILU_MUL, W_STAGES,
                    CHAIN,
                ),
            ),
            (
                _produce_x,
                (
                    x_desc, x_ring_0, x_ready_0, x_free_0, M, N, num_groups, gl.constexpr(0), BLOCK_N, GROUP_M,
                    X_STAGES,
                ),
            ),
            (
                _produce_x,
                (
                    x_desc, x_ring_1, x_ready_1, x_free_1, M, N, num_groups, gl.constexpr(1), BLOCK_N, GROUP_M,
                    X_STAGES,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip
