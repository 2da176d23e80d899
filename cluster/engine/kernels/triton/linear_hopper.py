"""The GEMM chain of `linear.py` for many rows, written for Hopper's warp groups: same bits.

One producer warp moves tiles of x and W through the bulk copy engine into a ring of STAGES buffers; two
or three consumer warp groups own a share of the rows of the output tile each. Programs are persistent: while a
consumer stores its part of a tile, the producer fills the ring for the next one and the other consumers
compute. Stage numbers are compile-time constants (a round of the ring is unrolled), which keeps buffer
addresses out of the loop; K is padded to whole rounds by the copy engine's zeros, which change nothing.

Barriers: `ready[s]` completes when all bytes of stage s are there, `free[s]` when all consumers are past
its product. Each is used once per round, so one phase bit per role is all the state.

Written in Gluon. Shape legend as in `linear.py`.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cluster.engine.kernels.triton import linear
from cluster.engine.kernels.triton.gluon_math import sigmoid_weighted
from cluster.engine.kernels.triton.gluon_names import async_load, async_store, barrier, reinterpret

_tile_of = gluon.jit(linear._tile_of.fn)


@gluon.jit
def _halves(y):
    """Left and right columns of a tile; no data moves."""
    return gl.split(gl.permute(gl.reshape(y, [y.shape[0], 2, y.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def _request_rows(x_desc, x_ring, ready, row, at, stage: gl.constexpr, CONSUMERS: gl.constexpr):
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    for which in gl.static_range(CONSUMERS):
        rows = x_ring.index(stage * CONSUMERS + which)
        async_load(x_desc, [row + which * ROWS, at], ready.index(stage), rows)


@gluon.jit
def _request_weights(w_desc, w_ring, ready, left, right, at, stage: gl.constexpr, STAGE_BYTES: gl.constexpr):
    """Before the rows of the stage: its barrier is told here what to expect."""
    mbarrier.expect(ready.index(stage), STAGE_BYTES)
    async_load(w_desc, [left, at], ready.index(stage), w_ring.index(stage * 2))
    async_load(w_desc, [right, at], ready.index(stage), w_ring.index(stage * 2 + 1))


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, ready, free, num_m_tiles, num_n_tiles, N, K,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, SILU_MUL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Fill the ring for all tiles of this program. A stage of W has two halves: of the columns, or gate and up.

    PDL: the first round's weights, which no kernel writes, are on their way while kernels before this one still run.
    This warp waits for them, in every program (`overlap.py`: or successors would overtake). Consumers need no wait of
    their own: they have nothing to store before rows have come.
    """
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    HALF: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    STAGE_BYTES: gl.constexpr = (CONSUMERS * ROWS + 2 * HALF) * BLOCK_K * 2
    LEFT: gl.constexpr = HALF if SILU_MUL else 2 * HALF
    to_right = N if SILU_MUL else HALF
    first_tile = gl.program_id(0)
    phase = 1
    if PDL:
        tile_m, tile_n = _tile_of(first_tile, num_m_tiles, num_n_tiles, GROUP_M)
        left = tile_n * LEFT
        for stage in gl.static_range(STAGES):
            _request_weights(w_desc, w_ring, ready, left, left + to_right, stage * BLOCK_K, stage, STAGE_BYTES)
        gdc_wait()
        for stage in gl.static_range(STAGES):
            _request_rows(x_desc, x_ring, ready, tile_m * CONSUMERS * ROWS, stage * BLOCK_K, stage, CONSUMERS)
        phase = 0
    for tile in range(first_tile, num_m_tiles * num_n_tiles, gl.num_programs(0)):
        start = 0
        if PDL:
            start = gl.where(tile == first_tile, BLOCK_K * STAGES, 0)
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        row = tile_m * CONSUMERS * ROWS
        left = tile_n * LEFT
        for k in range(start, K, BLOCK_K * STAGES):
            for stage in gl.static_range(STAGES):
                at = k + stage * BLOCK_K
                mbarrier.wait(free.index(stage), phase)
                _request_weights(w_desc, w_ring, ready, left, left + to_right, at, stage, STAGE_BYTES)
                _request_rows(x_desc, x_ring, ready, row, at, stage, CONSUMERS)
            phase ^= 1


@gluon.jit
def _store_part(y, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS: gl.constexpr):
    """Through shared memory: the copy engine drops what lies past the end. It reads the buffer later."""
    if HAS_BIAS:
        offs_n = column + gl.arange(0, y.shape[1], gl.SliceLayout(0, y.type.layout))
        y = y + gl.expand_dims(gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32), 0)
    tma.store_wait(0)
    barrier()
    buffer.store(y.to(out_desc.dtype))
    fence_async_shared()
    barrier()
    async_store(out_desc, [row, column], buffer)


@gluon.jit
def _store(y, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS: gl.constexpr):
    """In as many parts as the buffer asks for: 1, 2 or 4."""
    PART: gl.constexpr = out_desc.block_type.shape[1]
    if y.shape[1] == PART:
        _store_part(y, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS)
    elif y.shape[1] == 2 * PART:
        left, right = _halves(y)
        _store_part(left, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS)
        _store_part(right, bias_ptr, N, buffer, out_desc, row, column + PART, HAS_BIAS)
    else:
        left, right = _halves(y)
        first, second = _halves(left)
        third, fourth = _halves(right)
        _store_part(first, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS)
        _store_part(second, bias_ptr, N, buffer, out_desc, row, column + PART, HAS_BIAS)
        _store_part(third, bias_ptr, N, buffer, out_desc, row, column + 2 * PART, HAS_BIAS)
        _store_part(fourth, bias_ptr, N, buffer, out_desc, row, column + 3 * PART, HAS_BIAS)


@gluon.jit
def _consume(
    x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles, num_n_tiles, N, K,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr,
):  # fmt: skip
    """Rows WHICH * ROWS .. of every tile. One product is in flight while the stage before it is freed."""
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    HALF: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    COLUMNS: gl.constexpr = HALF if SILU_MUL else 2 * HALF
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    w_wide = reinterpret(w_ring, w_desc.dtype, [STAGES, 2 * HALF, BLOCK_K], w_desc.layout)
    buffer = out_buffers.index(WHICH)
    phase = 0
    for tile in range(gl.program_id(0), num_m_tiles * num_n_tiles, gl.num_programs(0)):
        acc = gl.zeros([ROWS, 2 * HALF], gl.float32, LAYOUT)
        for k in range(0, K, BLOCK_K * STAGES):
            for stage in gl.static_range(STAGES):
                mbarrier.wait(ready.index(stage), phase)
                token = warpgroup_mma(
                    x_ring.index(stage * CONSUMERS + WHICH), w_wide.index(stage).permute([1, 0]), acc, is_async=True
                )
                acc = warpgroup_mma_wait(1, deps=[token])
                barrier()
                if stage == 0:
                    mbarrier.arrive(free.index(STAGES - 1), count=1, pred=k > 0)
                else:
                    mbarrier.arrive(free.index(stage - 1), count=1)
            phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(free.index(STAGES - 1), count=1)
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        column = tile_n * COLUMNS
        row = (tile_m * CONSUMERS + WHICH) * ROWS
        if SILU_MUL:
            gate, up = _halves(acc)
            _store(sigmoid_weighted(gate) * up, bias_ptr, N, buffer, out_desc, row, column, False)
        else:
            _store(acc, bias_ptr, N, buffer, out_desc, row, column, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(
    x_desc, w_desc, out_desc, bias_ptr, M, N, K, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, HAS_BIAS: gl.constexpr,
    SILU_MUL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Boxes: x (rows of one consumer, BLOCK_K), W (half a stage's rows, BLOCK_K), out (rows of one consumer, a part).

    SILU_MUL: W holds 2N rows, [gate; up], and N counts the result's columns; no bias then.
    """
    gl.static_assert(STAGES > 1)  # a stage is freed when the product after its own has been started
    if PDL:
        gdc_launch_dependents()
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    HALF: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    num_m_tiles = gl.cdiv(M, CONSUMERS * ROWS)
    num_n_tiles = gl.cdiv(N, HALF if SILU_MUL else 2 * HALF)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES * 2, HALF, BLOCK_K], w_desc.layout)
    PART: gl.constexpr = out_desc.block_type.shape[1]
    out_buffers = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, ROWS, PART], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles,
                        num_n_tiles, N, K, gl.constexpr(0), CONSUMERS, STAGES, GROUP_M, HAS_BIAS, SILU_MUL,
                    ),
                ),
                (
                    _consume,
                    (
                        x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles,
                        num_n_tiles, N, K, gl.constexpr(1), CONSUMERS, STAGES, GROUP_M, HAS_BIAS, SILU_MUL,
                    ),
                ),
                (
                    _produce,
                    (
                        x_desc, w_desc, x_ring, w_ring, ready, free, num_m_tiles, num_n_tiles, N, K, CONSUMERS,
                        STAGES, GROUP_M, SILU_MUL, PDL,
                    ),
                ),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles,
                        num_n_tiles, N, K, gl.constexpr(0), CONSUMERS, STAGES, GROUP_M, HAS_BIAS, SILU_MUL,
                    ),
                ),
                (
                    _consume,
                    (
                        x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles,
                        num_n_tiles, N, K, gl.constexpr(1), CONSUMERS, STAGES, GROUP_M, HAS_BIAS, SILU_MUL,
                    ),
                ),
                (
                    _consume,
                    (
                        x_desc, w_desc, out_desc, bias_ptr, x_ring, w_ring, out_buffers, ready, free, num_m_tiles,
                        num_n_tiles, N, K, gl.constexpr(2), CONSUMERS, STAGES, GROUP_M, HAS_BIAS, SILU_MUL,
                    ),
                ),
                (
                    _produce,
                    (
                        x_desc, w_desc, x_ring, w_ring, ready, free, num_m_tiles, num_n_tiles, N, K, CONSUMERS,
                        STAGES, GROUP_M, SILU_MUL, PDL,
                    ),
                ),
            ],
            [4, 4, 1],
            [152, 152, 40],
        )  # fmt: skip
