"""The FP8 product of `fp8_linear.py` for many rows, second design for Hopper's warp groups: same bits.

As `fp8_hopper.py`, with what a tile's start and end cost there taken off the tensor core's time:

- Each consumer has a ring of its own for its 64 rows of x, beside the one for W that both read. A buffer of x has one
  reader and is free the sooner, so x needs fewer stages than W. Three producer warps fill the rings, each its own.
- Results leave through shared memory and the copy engine, which reads them while the next tile is computed. Scales
  are asked for where a tile begins.
- The second consumer begins LEAD groups after the first one and stays that much behind: while one ends a tile, the
  other one has products to do.

Barriers: `ready` of a buffer completes when its bytes are there. Groups are counted on from tile to tile; group i of a
consumer completes its `done[i % W_STAGES]` for the i / W_STAGES-th time, with the other groups of its chain. Who waits
for it cannot miss a completion, for the next one but one needs what the waiting warp has yet to give:

    W for group i            group i - W_STAGES of both consumers; group i needs that W
    x for group i            group i - X_STAGES of its consumer; group i - X_STAGES + W_STAGES >= i needs that x
    second consumer, once    group LEAD - 1 of the first one, whose group W_STAGES needs the second one's group 0

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

from cluster.engine.kernels.triton.fp8_hopper import _tile_of, _with_bias, silu_mul
from cluster.engine.kernels.triton.gluon_names import async_load, barrier
from cluster.engine.kernels.triton.gluon_rings import next_stage
from cluster.engine.kernels.triton.linear_hopper import _store


@gluon.jit
def _produce_x(
    x_desc, ring, ready, done, M, N, num_groups, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * 64 .. + 63 of each tile, into the ring of their consumer."""
    GROUP_K: gl.constexpr = x_desc.block_type.shape[1]
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 0
    done_stage = (W_STAGES - X_STAGES) % W_STAGES  # of the group X_STAGES before this one
    done_phase = 1
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        tile_m, _ = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * 128 + WHICH * 64
        for group in range(num_groups):
            mbarrier.wait(done.index(done_stage), done_phase)
            mbarrier.expect(ready.index(stage), 64 * GROUP_K)
            async_load(x_desc, [row, group * GROUP_K], ready.index(stage), ring.index(stage))
            stage, phase = next_stage(stage, phase, X_STAGES)
            done_stage, done_phase = next_stage(done_stage, done_phase, W_STAGES)


@gluon.jit
def _produce_w(
    w_desc, ring, ready, done_0, done_1, M, N, num_groups, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    HALVES: gl.constexpr, SILU_MUL: gl.constexpr, W_STAGES: gl.constexpr,
):  # fmt: skip
    """128 or 256 rows of W, the second half of them from `up` with SwiGLU."""
    GROUP_K: gl.constexpr = w_desc.block_type.shape[1]
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        _, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        column = tile_n * BLOCK_N
        second = column + (N if SILU_MUL else 128)
        for group in range(num_groups):
            k = group * GROUP_K
            mbarrier.wait(done_0.index(stage), phase)
            mbarrier.wait(done_1.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, HALVES * 128 * GROUP_K)
            async_load(w_desc, [column, k], bar, ring.index(HALVES * stage))
            if HALVES == 2:
                async_load(w_desc, [second, k], bar, ring.index(HALVES * stage + 1))
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
def _consume(
    x_ring, w_ring, x_ready, w_ready, done, other_done, x_scale_ptr, w_scale_ptr, bias_ptr, out_desc, buffer,
    M, N, num_groups, stride_x_scale, WHICH: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    HALVES: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr, SCALE_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, LEAD: gl.constexpr, CHAIN: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * 64 .. + 63 of each tile; 128 outputs at a time, so that sums and accumulators fit the registers."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    num_m_tiles = (M + 127) // 128
    num_n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    zeros = gl.zeros([64, 128], gl.float32, LAYOUT)
    x_stage = 0
    x_phase = 0
    w_stage = 0
    w_phase = 0
    if WHICH == 1 and LEAD > 0:
        mbarrier.wait(other_done.index(LEAD - 1), 0)
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
            x_first = x_stage
            w_first = w_stage
            part = zeros
            for i in gl.static_range(CHAIN):
                mbarrier.wait(x_ready.index(x_stage), x_phase)
                mbarrier.wait(w_ready.index(w_stage), w_phase)
                w = w_ring.index(HALVES * w_stage).permute([1, 0])
                part = warpgroup_mma(x_ring.index(x_stage), w, part, use_acc=i > 0, is_async=True)
                x_stage, x_phase = next_stage(x_stage, x_phase, X_STAGES)
                w_stage, w_phase = next_stage(w_stage, w_phase, W_STAGES)
            part = warpgroup_mma_wait(0, deps=[part])
            if HALVES == 2:
                acc = acc + part
                x_again = x_first
                w_again = w_first
                part = zeros
                for i in gl.static_range(CHAIN):
                    w = w_ring.index(HALVES * w_again + 1).permute([1, 0])
                    part = warpgroup_mma(x_ring.index(x_again), w, part, use_acc=i > 0, is_async=True)
                    x_again, _ = next_stage(x_again, 0, X_STAGES)
                    w_again, _ = next_stage(w_again, 0, W_STAGES)
                part = warpgroup_mma_wait(0, deps=[part])
            barrier()
            for _ in gl.static_range(CHAIN):
                mbarrier.arrive(done.index(w_first), count=1)
                w_first, _ = next_stage(w_first, 0, W_STAGES)
            if HALVES == 2:
                second = second + part
            elif SCALE_ROWS > 0:
                acc = gl.fma(part, gl.expand_dims(scale, 1) + gl.zeros_like(acc), acc)
            else:
                acc = acc + part
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
    """Tiles of 128 rows and BLOCK_N outputs, shared out among the programs, each of which has one at least.
    `num_groups` is a multiple of CHAIN, groups past the end of K read zeros; LEAD is at most that many. Boxes: 64 x 128
    of x, 128 x 128 of W, 64 x a part (1, 2 or 4 to 128 columns) of the result. Shapes and scales as in
    `fp8_hopper.py`."""
    gl.static_assert(SCALE_ROWS == 0 or (SCALE_ROWS == 128 and BLOCK_N == 128 and not SILU_MUL))
    gl.static_assert(BLOCK_N == 128 or not SILU_MUL)
    gl.static_assert(X_STAGES <= W_STAGES)
    gl.static_assert(CHAIN <= X_STAGES and (SCALE_ROWS == 0 or CHAIN == 1))
    gl.static_assert((LEAD + CHAIN - 1) // CHAIN * CHAIN <= W_STAGES)
    HALVES: gl.constexpr = 2 if SILU_MUL else BLOCK_N // 128
    GROUP_K: gl.constexpr = x_desc.block_type.shape[1]
    PART: gl.constexpr = out_desc.block_type.shape[1]
    x_ring_0 = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, 64, GROUP_K], x_desc.layout)
    x_ring_1 = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, 64, GROUP_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [HALVES * W_STAGES, 128, GROUP_K], w_desc.layout)
    buffers = gl.allocate_shared_memory(out_desc.dtype, [2, 64, PART], out_desc.layout)
    x_ready_0 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_ready_1 = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_ready = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    done_0 = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    done_1 = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready_0.index(stage), count=1)
        mbarrier.init(x_ready_1.index(stage), count=1)
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(w_ready.index(stage), count=1)
        mbarrier.init(done_0.index(stage), count=1)
        mbarrier.init(done_1.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring_0, w_ring, x_ready_0, w_ready, done_0, done_1, x_scale_ptr, w_scale_ptr, bias_ptr,
                    out_desc, buffers.index(0), M, N, num_groups, stride_x_scale, gl.constexpr(0), BLOCK_N, GROUP_M,
                    HALVES, HAS_BIAS, SILU_MUL, SCALE_ROWS, X_STAGES, W_STAGES, LEAD, CHAIN,
                ),
            ),
            (
                _consume,
                (
                    x_ring_1, w_ring, x_ready_1, w_ready, done_1, done_0, x_scale_ptr, w_scale_ptr, bias_ptr,
                    out_desc, buffers.index(1), M, N, num_groups, stride_x_scale, gl.constexpr(1), BLOCK_N, GROUP_M,
                    HALVES, HAS_BIAS, SILU_MUL, SCALE_ROWS, X_STAGES, W_STAGES, LEAD, CHAIN,
                ),
            ),
            (
                _produce_w,
                (
                    w_desc, w_ring, w_ready, done_0, done_1, M, N, num_groups, BLOCK_N, GROUP_M, HALVES, SILU_MUL,
                    W_STAGES,
                ),
            ),
            (
                _produce_x,
                (
                    x_desc, x_ring_0, x_ready_0, done_0, M, N, num_groups, gl.constexpr(0), BLOCK_N, GROUP_M,
                    X_STAGES, W_STAGES,
                ),
            ),
            (
                _produce_x,
                (
                    x_desc, x_ring_1, x_ready_1, done_1, M, N, num_groups, gl.constexpr(1), BLOCK_N, GROUP_M,
                    X_STAGES, W_STAGES,
                ),
            ),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip
