"""The GEMM chain of `linear.py` for few rows, where reading the weight is all there is to do: same bits.

A ring of weight tiles in shared memory is kept full by the bulk copy engine, and it goes on across the
tiles of a program. The first round of weight tiles is requested BEFORE the wait for earlier kernels
(`griddepcontrol.wait`), and the next kernel may be set up at once, so the memory never idles between two
GEMMs nor under the small kernels between them.

What makes that safe, and must stay so: before the wait a program reads nothing but the weight, which no
kernel writes; x, the bias and the result are touched after it, by every thread that touches them. A program
that did not wait would let its successors overtake its predecessors.

Written in Gluon, which leaves layouts and barriers to the author. Shape legend as in `linear.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cluster.engine.kernels.triton import linear
from cluster.engine.kernels.triton.gluon_names import async_load, barrier

_sigmoid_weighted = gluon.jit(linear._sigmoid_weighted.fn)


@gluon.jit
def _request_weight(
    w_desc, w_ring, tail_desc, tail_ring, ready, stage, tile, k, N, num_m_tiles, BLOCK_N: gl.constexpr,
    TAIL_N: gl.constexpr, STAGE_BYTES: gl.constexpr, SILU_MUL: gl.constexpr, ONE_ROW_TILE: gl.constexpr,
):  # fmt: skip
    """Announce all bytes of a stage and start its weight part. SILU_MUL: gate tile, then up tile."""
    row = (tile if ONE_ROW_TILE else tile // num_m_tiles) * (BLOCK_N + TAIL_N)
    mbarrier.expect(ready.index(stage), STAGE_BYTES)
    if SILU_MUL:
        async_load(w_desc, [row, k], ready.index(stage), w_ring.index(stage * 2))
        async_load(w_desc, [N + row, k], ready.index(stage), w_ring.index(stage * 2 + 1))
    else:
        async_load(w_desc, [row, k], ready.index(stage), w_ring.index(stage))
    if TAIL_N > 0:
        async_load(tail_desc, [row + BLOCK_N, k], ready.index(stage), tail_ring.index(stage))


@gluon.jit
def _request_rows(
    x_desc, x_ring, ready, stage, tile, k, num_m_tiles, BLOCK_M: gl.constexpr, ONE_ROW_TILE: gl.constexpr
):
    row = 0 if ONE_ROW_TILE else tile % num_m_tiles * BLOCK_M
    async_load(x_desc, [row, k], ready.index(stage), x_ring.index(stage))


@gluon.jit
def _next(tile, k, K, BLOCK_K: gl.constexpr):
    """The place a program loads from next: along K, then its next tile."""
    k += BLOCK_K
    past = k >= K
    return gl.where(past, tile + gl.num_programs(0), tile), gl.where(past, 0, k)


@gluon.jit
def _zeros(BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SWAP: gl.constexpr, WARPGROUP: gl.constexpr):
    """An accumulator of the instruction in use."""
    TALL: gl.constexpr = BLOCK_N if SWAP else BLOCK_M
    WIDE: gl.constexpr = BLOCK_M if SWAP else BLOCK_N
    if WARPGROUP:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])  # type: ignore[no-redef]
    return gl.zeros([TALL, WIDE], gl.float32, LAYOUT)


@gluon.jit
def _multiply(w_tile, x_tile, acc, SWAP: gl.constexpr, WARPGROUP: gl.constexpr):
    """acc += W xᵀ (SWAP) or x Wᵀ over the K of one stage, in ascending steps of 16."""
    if SWAP:
        acc = warpgroup_mma(w_tile, x_tile.permute([1, 0]), acc)
    elif WARPGROUP:
        acc = warpgroup_mma(x_tile, w_tile.permute([1, 0]), acc)
    else:
        x = x_tile.load(gl.DotOperandLayout(0, acc.type.layout, 2))
        w = w_tile.permute([1, 0]).load(gl.DotOperandLayout(1, acc.type.layout, 2))
        acc = mma_v2(x, w, acc)
    return acc


@gluon.jit
def _multiply_both(w_tile, tail_tile, x_tile, acc, tail):
    """`_multiply` of both parts of a tile's columns, one behind the other."""
    acc = warpgroup_mma(x_tile, w_tile.permute([1, 0]), acc, is_async=True)
    tail = warpgroup_mma(x_tile, tail_tile.permute([1, 0]), tail, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc, tail])


@gluon.jit
def _store(
    acc, up, bias_ptr, out_ptr, row, column, M, N, stride_out,
    SWAP: gl.constexpr, HAS_BIAS: gl.constexpr, SILU_MUL: gl.constexpr,
):  # fmt: skip
    """`linear._finish`, then straight from registers: the result is small beside the weight."""
    layout: gl.constexpr = acc.type.layout
    M_AXIS: gl.constexpr = 1 if SWAP else 0
    BLOCK_M: gl.constexpr = acc.shape[M_AXIS]
    BLOCK_N: gl.constexpr = acc.shape[1 - M_AXIS]
    offs_m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1 - M_AXIS, layout))
    offs_n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(M_AXIS, layout))
    wide_m = gl.expand_dims(offs_m, 1 - M_AXIS)
    wide_n = gl.expand_dims(offs_n, M_AXIS)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc = acc + gl.expand_dims(bias, M_AXIS)
    if SILU_MUL:
        acc = _sigmoid_weighted(acc) * up
    places = out_ptr + wide_m.to(gl.int64) * stride_out + wide_n
    gl.store(places, acc.to(out_ptr.dtype.element_ty), mask=(wide_m < M) & (wide_n < N))


@gluon.jit(do_not_specialize=["M"])
def stream_kernel(
    x_desc, w_desc, tail_desc, bias_ptr, out_ptr, M, N, K, stride_out, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, TAIL_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    SWAP: gl.constexpr, WARPGROUP: gl.constexpr, ONE_ROW_TILE: gl.constexpr, HAS_BIAS: gl.constexpr,
    SILU_MUL: gl.constexpr, LAUNCH_FIRST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Programs take the tiles in turn, at most one program per tile. All threads do everything together.

    WARPGROUP with SWAP: the weight on the wide side of the warp group instruction, 8 to 256 rows of x per tile.
    WARPGROUP without: x padded to 64 rows. Else the warps' own instruction, 16 rows, warps side by side along N.
    TAIL_N: a tile has so many outputs more, in boxes and an accumulator of their own, so that there can be about as
    many tiles as multiprocessors: 128 tiles of 80 outputs, not 160 of 64. Without SWAP and SILU_MUL; 0: none.
    LAUNCH_FIRST: let the next kernel be set up at the very start instead of after the wait.
    A stage is asked for again only after all threads are past its product: hence the barrier in the loop.
    """
    if PDL and LAUNCH_FIRST:
        gdc_launch_dependents()
    gl.static_assert(TAIL_N == 0 or (WARPGROUP and not SWAP and not SILU_MUL))
    HALVES: gl.constexpr = 2 if SILU_MUL else 1
    STAGE_BYTES: gl.constexpr = (HALVES * BLOCK_N + TAIL_N + BLOCK_M) * BLOCK_K * 2
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES * HALVES, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    tail_ring = w_ring
    if TAIL_N > 0:
        tail_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, TAIL_N, BLOCK_K], tail_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    barrier()

    first_tile = gl.program_id(0)
    num_m_tiles = 1 if ONE_ROW_TILE else gl.cdiv(M, BLOCK_M)
    num_my_tiles = gl.cdiv(gl.cdiv(N, BLOCK_N + TAIL_N) * num_m_tiles - first_tile, gl.num_programs(0))
    steps = gl.cdiv(K, BLOCK_K)
    total = num_my_tiles * steps
    tile = first_tile
    k = 0
    for stage in gl.static_range(STAGES):
        if stage < total:
            _request_weight(
                w_desc, w_ring, tail_desc, tail_ring, ready, stage, tile, k, N, num_m_tiles, BLOCK_N, TAIL_N,
                STAGE_BYTES, SILU_MUL, ONE_ROW_TILE,
            )  # fmt: skip
        tile, k = _next(tile, k, K, BLOCK_K)
    if PDL:
        gdc_wait()
        if not LAUNCH_FIRST:
            gdc_launch_dependents()
    tile = first_tile
    k = 0
    for stage in gl.static_range(STAGES):
        if stage < total:
            _request_rows(x_desc, x_ring, ready, stage, tile, k, num_m_tiles, BLOCK_M, ONE_ROW_TILE)
        tile, k = _next(tile, k, K, BLOCK_K)

    left = total - STAGES
    stage = 0
    phase = 0
    for index in range(num_my_tiles):
        acc = _zeros(BLOCK_M, BLOCK_N, SWAP, WARPGROUP)
        up = _zeros(BLOCK_M, BLOCK_N, SWAP, WARPGROUP)
        if TAIL_N > 0:
            tail = _zeros(BLOCK_M, TAIL_N, SWAP, WARPGROUP)
        for _ in range(steps):
            mbarrier.wait(ready.index(stage), phase)
            if TAIL_N > 0:
                acc, tail = _multiply_both(
                    w_ring.index(stage), tail_ring.index(stage), x_ring.index(stage), acc, tail
                )  # fmt: skip
            else:
                acc = _multiply(w_ring.index(stage * HALVES), x_ring.index(stage), acc, SWAP, WARPGROUP)
            if SILU_MUL:
                up = _multiply(w_ring.index(stage * 2 + 1), x_ring.index(stage), up, SWAP, WARPGROUP)
            if not WARPGROUP:
                fence_async_shared()  # the threads' own reads come before the copy engine's next write
            barrier()
            if left > 0:
                _request_weight(
                    w_desc, w_ring, tail_desc, tail_ring, ready, stage, tile, k, N, num_m_tiles, BLOCK_N, TAIL_N,
                    STAGE_BYTES, SILU_MUL, ONE_ROW_TILE,
                )  # fmt: skip
                _request_rows(x_desc, x_ring, ready, stage, tile, k, num_m_tiles, BLOCK_M, ONE_ROW_TILE)
            left -= 1
            tile, k = _next(tile, k, K, BLOCK_K)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        done = first_tile + index * gl.num_programs(0)
        row = 0 if ONE_ROW_TILE else done % num_m_tiles * BLOCK_M
        column = (done if ONE_ROW_TILE else done // num_m_tiles) * (BLOCK_N + TAIL_N)
        _store(acc, up, bias_ptr, out_ptr, row, column, M, N, stride_out, SWAP, HAS_BIAS, SILU_MUL)
        if TAIL_N > 0:
            _store(tail, tail, bias_ptr, out_ptr, row, column + BLOCK_N, M, N, stride_out, SWAP, HAS_BIAS, False)
