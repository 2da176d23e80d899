"""The FP8 product of `fp8_linear.py` for few rows, where reading the weights decides: same definition, same bits.

64 outputs per program, on the tall side of the instruction, so that as few as 8 rows of x fill the narrow
one. A producer warp keeps a deep ring of weights on its way; one warp group computes the sums of four groups
of features side by side and adds them in order, so that a wait is shared by four.

Written in Gluon, which leaves layouts and waits to the author.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from cluster.engine.kernels.triton.gluon_math import silu_mul
from cluster.engine.kernels.triton.gluon_names import async_load, barrier


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, ready, free, M, N, num_batches, BLOCK_M: gl.constexpr, GROUP_K: gl.constexpr,
    SILU_MUL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four groups to a stage. Groups past the end of K read zeros, and change nothing."""
    WEIGHTS: gl.constexpr = 2 if SILU_MUL else 1
    num_m_tiles = (M + BLOCK_M - 1) // BLOCK_M
    index = 0
    for tile in range(gl.program_id(0), num_m_tiles * ((N + 63) // 64), gl.num_programs(0)):
        row = tile % num_m_tiles * BLOCK_M
        column = tile // num_m_tiles * 64
        for batch in range(num_batches):
            stage = index % STAGES
            mbarrier.wait(free.index(stage), (index // STAGES + 1) & 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, 4 * (BLOCK_M + WEIGHTS * 64) * GROUP_K)
            for part in gl.static_range(4):
                k = (batch * 4 + part) * GROUP_K
                slot = stage * 4 + part
                async_load(w_desc, [column, k], bar, w_ring.index(WEIGHTS * slot))
                if SILU_MUL:
                    async_load(w_desc, [N + column, k], bar, w_ring.index(WEIGHTS * slot + 1))
                async_load(x_desc, [row, k], bar, x_ring.index(slot))
            index += 1


@gluon.jit
def _start(w_ring, x_ring, slot, zeros, WHICH: gl.constexpr, WEIGHTS: gl.constexpr):
    """One group's sum, on its way."""
    w = w_ring.index(WEIGHTS * slot + WHICH)
    return warpgroup_mma(w, x_ring.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_chain(w_ring, x_ring, slot, zeros, WHICH: gl.constexpr, WEIGHTS: gl.constexpr, CHAIN: gl.constexpr):
    """The sum of CHAIN groups, on its way."""
    part = _start(w_ring, x_ring, slot, zeros, WHICH, WEIGHTS)
    for i in gl.static_range(1, CHAIN):
        w = w_ring.index(WEIGHTS * (slot + i) + WHICH)
        part = warpgroup_mma(w, x_ring.index(slot + i).permute([1, 0]), part, is_async=True)
    return part


@gluon.jit
def _add_chains(acc, w_ring, x_ring, slot, zeros, WHICH: gl.constexpr, WEIGHTS: gl.constexpr, CHAIN: gl.constexpr):
    """The sums of a stage, 4 / CHAIN of them, into an accumulator of channels."""
    for first in gl.static_range(0, 4, CHAIN):
        part = _start_chain(w_ring, x_ring, slot + first, zeros, WHICH, WEIGHTS, CHAIN)
        acc = acc + warpgroup_mma_wait(0, deps=[part])
    return acc


@gluon.jit
def _add(acc, part, x_scale_rows, w_scale_ptr, group, num_groups, SCALE_ROWS: gl.constexpr):
    """One group's sum into the accumulator, outputs along axis 0; its 64 outputs lie in one row of blocks."""
    if SCALE_ROWS > 0:
        exists = group < num_groups
        w_scale = gl.load(w_scale_ptr + group, mask=exists, other=0.0)
        scale = gl.load(x_scale_rows + group, mask=exists, other=0.0) * w_scale
        acc = gl.fma(part, gl.expand_dims(scale, 0) + gl.zeros_like(acc), acc)
    else:
        acc = acc + part
    return acc


@gluon.jit
def _scaled(acc, x_scale, w_scale_ptr, columns, N, SCALE_ROWS: gl.constexpr):
    """`fp8_linear._scaled` with outputs along axis 0."""
    if SCALE_ROWS == 0:
        w_scale = gl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
        acc = (acc * gl.expand_dims(x_scale, 0)) * gl.expand_dims(w_scale, 1)
    return acc


@gluon.jit
def _consume(
    x_ring, w_ring, ready, free, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups, stride_x_scale,
    stride_out, BLOCK_M: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr, SCALE_ROWS: gl.constexpr,
    STAGES: gl.constexpr, CHAIN: gl.constexpr,
):  # fmt: skip
    WEIGHTS: gl.constexpr = 2 if SILU_MUL else 1
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    num_m_tiles = (M + BLOCK_M - 1) // BLOCK_M
    zeros = gl.zeros([64, BLOCK_M], gl.float32, LAYOUT)
    index = 0
    for tile in range(gl.program_id(0), num_m_tiles * ((N + 63) // 64), gl.num_programs(0)):
        column = tile // num_m_tiles * 64
        columns = column + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        rows = tile % num_m_tiles * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
        x_scale_rows = x_scale_ptr + gl.minimum(rows, M - 1).to(gl.int64) * stride_x_scale
        w_scales = w_scale_ptr
        up_scales = w_scale_ptr
        if SCALE_ROWS > 0:
            w_scales += column // SCALE_ROWS * num_groups
            up_scales += (N + column) // SCALE_ROWS * num_groups
        acc = zeros
        up = zeros
        for batch in range((num_groups + 3) // 4):
            stage = index % STAGES
            mbarrier.wait(ready.index(stage), (index // STAGES) & 1)
            slot = stage * 4
            group = batch * 4
            if CHAIN > 1:
                acc = _add_chains(acc, w_ring, x_ring, slot, zeros, 0, WEIGHTS, CHAIN)
                if SILU_MUL:
                    up = _add_chains(up, w_ring, x_ring, slot, zeros, 1, WEIGHTS, CHAIN)
                barrier()
                mbarrier.arrive(free.index(stage), count=1)
            else:
                a0 = _start(w_ring, x_ring, slot, zeros, 0, WEIGHTS)
                a1 = _start(w_ring, x_ring, slot + 1, zeros, 0, WEIGHTS)
                a2 = _start(w_ring, x_ring, slot + 2, zeros, 0, WEIGHTS)
                a3 = _start(w_ring, x_ring, slot + 3, zeros, 0, WEIGHTS)
                if SILU_MUL:
                    b0 = _start(w_ring, x_ring, slot, zeros, 1, WEIGHTS)
                    b1 = _start(w_ring, x_ring, slot + 1, zeros, 1, WEIGHTS)
                    b2 = _start(w_ring, x_ring, slot + 2, zeros, 1, WEIGHTS)
                    b3 = _start(w_ring, x_ring, slot + 3, zeros, 1, WEIGHTS)
                    a0, a1, a2, a3, b0, b1, b2, b3 = warpgroup_mma_wait(0, deps=[a0, a1, a2, a3, b0, b1, b2, b3])
                else:
                    a0, a1, a2, a3 = warpgroup_mma_wait(0, deps=[a0, a1, a2, a3])
                barrier()
                mbarrier.arrive(free.index(stage), count=1)
                acc = _add(acc, a0, x_scale_rows, w_scales, group, num_groups, SCALE_ROWS)
                acc = _add(acc, a1, x_scale_rows, w_scales, group + 1, num_groups, SCALE_ROWS)
                acc = _add(acc, a2, x_scale_rows, w_scales, group + 2, num_groups, SCALE_ROWS)
                acc = _add(acc, a3, x_scale_rows, w_scales, group + 3, num_groups, SCALE_ROWS)
                if SILU_MUL:
                    up = _add(up, b0, x_scale_rows, up_scales, group, num_groups, SCALE_ROWS)
                    up = _add(up, b1, x_scale_rows, up_scales, group + 1, num_groups, SCALE_ROWS)
                    up = _add(up, b2, x_scale_rows, up_scales, group + 2, num_groups, SCALE_ROWS)
                    up = _add(up, b3, x_scale_rows, up_scales, group + 3, num_groups, SCALE_ROWS)
            index += 1
        x_scale = gl.load(x_scale_rows)
        y = _scaled(acc, x_scale, w_scale_ptr, columns, N, SCALE_ROWS)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)
            y = y + gl.expand_dims(bias, 1)
        if SILU_MUL:
            y = silu_mul(y, _scaled(up, x_scale, w_scale_ptr + N, columns, N, SCALE_ROWS))
        keep = gl.expand_dims(columns < N, 1) & gl.expand_dims(rows < M, 0)
        places = gl.expand_dims(rows.to(gl.int64) * stride_out, 0) + gl.expand_dims(columns, 1)
        gl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=keep)


@gluon.jit(do_not_specialize=["M"])
def fp8_stream_kernel(
    x_desc, x_scale_ptr, w_desc, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups, stride_x_scale, stride_out,
    BLOCK_M: gl.constexpr, GROUP_K: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr,
    SCALE_ROWS: gl.constexpr, STAGES: gl.constexpr, CHAIN: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 outputs and BLOCK_M rows, the weight on the tall side. Boxes: BLOCK_M x 128 of x, 64 x 128 of
    W. SCALE_ROWS is 0 or a multiple of 64. CHAIN groups are summed in one go: 1, or per channel 2 or 4."""
    WEIGHTS: gl.constexpr = 2 if SILU_MUL else 1
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [4 * STAGES, BLOCK_M, GROUP_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [4 * WEIGHTS * STAGES, 64, GROUP_K], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring, w_ring, ready, free, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, num_groups,
                    stride_x_scale, stride_out, BLOCK_M, HAS_BIAS, SILU_MUL, SCALE_ROWS, STAGES, CHAIN,
                ),
            ),
            (
                _produce,
                (
                    x_desc, w_desc, x_ring, w_ring, ready, free, M, N, (num_groups + 3) // 4, BLOCK_M, GROUP_K,
                    SILU_MUL, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
