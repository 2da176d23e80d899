"""The tiled attention of `attention.py` written for Hopper's warp groups: same definition, same bits.

One producer warp moves K and V blocks through the bulk copy engine into a ring of buffers; two
consumer warp groups take 64 rows of the tile each, and each overlaps the softmax of block i with the
p·v product of block i - 1. One program per tile: persistent programs were measured and lost (their
barrier and buffer addresses leave the uniform registers). Written in Gluon, which leaves layouts and
waits to the author; a plan asks for it by name, and every other plan gives the same bits.

Shape legend as in `attention.py`. Blocks have BLOCK_KV keys and cache blocks are whole multiples.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cluster.engine.kernels.triton.gluon_math import quotient
from cluster.engine.kernels.triton.gluon_names import async_load, barrier
from cluster.engine.kernels.triton.row_sums import lane_sums, total, wide


@gluon.jit
def _first_visible(position, window):
    """`attention.first_visible`."""
    first = 0
    if window is not None:
        first = gl.maximum(position - window + 1, 0)
    return first


@gluon.jit
def _produce(
    kv_desc, table_ptr, k_ring, v_ring, k_ready, v_ready, k_free, v_free, first_block, num_blocks, place_head,
    rows_per_block, rows_of_kv, first_id, BLOCK_KV: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    LOOKAHEAD: gl.constexpr,
):  # fmt: skip
    """Fill the rings in key order; a buffer is reused when both consumers have freed it.

    With LOOKAHEAD the cache block of a key block is looked up while the one before it is on its way, that of the first
    one, `first_id`, by who listed the tile.
    """
    next_id = first_id
    for i in range(num_blocks):
        stage = i % STAGES
        free_phase = (i // STAGES + 1) & 1
        start = (first_block + i) * BLOCK_KV
        if LOOKAHEAD:
            block = next_id
            next_block = first_block + gl.minimum(i + 1, num_blocks - 1)
            next_id = gl.load(table_ptr + next_block * BLOCK_KV // BLOCK_SIZE)
        else:
            block = gl.load(table_ptr + start // BLOCK_SIZE)
        place = block * rows_per_block + place_head + start % BLOCK_SIZE
        mbarrier.wait(k_free.index(stage), free_phase)
        mbarrier.expect(k_ready.index(stage), kv_desc.block_type.nbytes)
        async_load(kv_desc, [place, 0], k_ready.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), free_phase)
        mbarrier.expect(v_ready.index(stage), kv_desc.block_type.nbytes)
        async_load(kv_desc, [place + rows_of_kv, 0], v_ready.index(stage), v_ring.index(stage))


@gluon.jit
def _softmax(s, q_pos, start, m, scale_log2, masked, window, S_LAYOUT: gl.constexpr, BLOCK_KV: gl.constexpr):
    """`attention.probabilities`, the mask decided at run time."""
    if masked:
        key_pos = start + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, S_LAYOUT))
        visible = gl.expand_dims(key_pos, 0) <= gl.expand_dims(q_pos, 1)
        if window is not None:
            visible = visible & (gl.expand_dims(key_pos, 0) > gl.expand_dims(q_pos - window, 1))
        s = gl.where(visible, s, float("-inf"))
    top = gl.maximum(m, gl.max(s, axis=1) * scale_log2)
    shift = gl.where(top == float("-inf"), 0.0, top)
    zeros = gl.zeros_like(s)
    p = gl.exp2(gl.fma(s, zeros + scale_log2, zeros - gl.expand_dims(shift, 1)))
    return top, gl.exp2(m - shift), p


@gluon.jit
def _zero_stale_values(v_buffer, start, context, BLOCK_KV: gl.constexpr, D: gl.constexpr):
    """Rows past the end of the sequence may hold anything, NaN too: they count as 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    key_pos = start + gl.arange(0, BLOCK_KV, gl.SliceLayout(1, layout))
    values = v_buffer.load(layout)
    keep = gl.expand_dims(key_pos, 1) < context
    v_buffer.store(gl.where(keep, values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _consume(
    q_ptr, out_ptr, q_shared, k_ring, v_ring, k_ready, v_ready, k_free, v_free, first_block, num_blocks, row_start,
    num_rows, context, first_row, kv_head, window, scale_log2, stride_q, stride_out, WHICH: gl.constexpr,
    GROUP: gl.constexpr, ROWS_PER_TILE: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT_KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of the tile: rows WHICH * 64 .. + 63, each (row of the sequence, query head).

    The i-th block is number first_block + i of the sequence; none before it is seen by any row of the tile.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    BLOCKS_PER_SPLIT: gl.constexpr = SPLIT_KEYS // BLOCK_KV
    q_buffer = q_shared.index(WHICH)
    tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, Q_LAYOUT))
    row = first_row + tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    q_offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_q + head * D, 1) + gl.expand_dims(offs_d, 0)
    q_buffer.store(gl.load(q_ptr + q_offsets, mask=gl.expand_dims(valid, 1), other=0.0))
    fence_async_shared()
    barrier()

    s_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    q_pos = context - num_rows + gl.minimum(first_row + s_row // GROUP, num_rows - 1)
    first_pos = context - num_rows + first_row + WHICH * 64 // GROUP
    # Blocks from whole_from up to whole_to (counted from first_block) are seen whole by every row, the others in part.
    whole_to = (first_pos + 1) // BLOCK_KV - first_block
    whole_from = 0
    if window is not None:
        last_pos = context - num_rows + gl.minimum(first_row + (WHICH * 64 + 63) // GROUP, num_rows - 1)
        whole_from = (_first_visible(last_pos, window) + BLOCK_KV - 1) // BLOCK_KV - first_block

    zeros_s = gl.zeros([64, BLOCK_KV], gl.float32, S_LAYOUT)
    minus = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    M = minus
    L = gl.zeros([64, 8], gl.float32, L_LAYOUT)
    O = gl.zeros([64, D], gl.float32, O_LAYOUT)
    acc = gl.zeros([64, D], gl.float32, O_LAYOUT)

    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q_buffer, k_ring.index(0).permute([1, 0]), zeros_s, use_acc=False)
    barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    masked = whole_to <= 0
    if window is not None:
        masked = masked | (whole_from > 0)
    m, alpha, p = _softmax(s, q_pos, first_block * BLOCK_KV, minus, scale_log2, masked, window, S_LAYOUT, BLOCK_KV)
    l = gl.convert_layout(lane_sums(p), L_LAYOUT)
    p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)

    for i in range(1, num_blocks):
        stage = i % STAGES
        previous = (i - 1) % STAGES
        mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
        s_token = warpgroup_mma(q_buffer, k_ring.index(stage).permute([1, 0]), zeros_s, use_acc=False, is_async=True)
        acc = acc * wide(alpha, acc, O_LAYOUT)
        mbarrier.wait(v_ready.index(previous), ((i - 1) // STAGES) & 1)
        acc_token = warpgroup_mma(p_operand, v_ring.index(previous), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_token])
        barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        block = first_block + i
        new_split = block % BLOCKS_PER_SPLIT == 0
        before = gl.where(new_split, minus, m)
        masked = i >= whole_to
        if window is not None:
            masked = masked | (i < whole_from)
        top, alpha, p = _softmax(s, q_pos, block * BLOCK_KV, before, scale_log2, masked, window, S_LAYOUT, BLOCK_KV)
        sums = gl.convert_layout(lane_sums(p), L_LAYOUT)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        barrier()
        mbarrier.arrive(v_free.index(previous), count=1)
        if new_split:  # alpha is 0 here, which clears l and acc for the split that begins
            M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)
        m = top
        l = gl.fma(l, wide(alpha, l, L_LAYOUT), sums)
        p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)

    last = num_blocks - 1
    mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
    if (first_block + num_blocks) * BLOCK_KV > context:
        _zero_stale_values(v_ring.index(last % STAGES), (first_block + last) * BLOCK_KV, context, BLOCK_KV, D)
        barrier()
    acc = acc * wide(alpha, acc, O_LAYOUT)
    acc = warpgroup_mma(p_operand, v_ring.index(last % STAGES), acc)
    M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)

    y = quotient(O, gl.expand_dims(total(L, O_LAYOUT), 1) + gl.zeros_like(O)) + 0.0
    if out_ptr.dtype.element_ty == q_ptr.dtype.element_ty:
        # Back through q's buffer, whose last reader has ended, so that rows leave in pieces of 16 bytes.
        q_buffer.store(y.to(q_ptr.dtype.element_ty))
        barrier()
        offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_out + head * D, 1) + gl.expand_dims(offs_d, 0)
        gl.store(out_ptr + offsets, q_buffer.load(Q_LAYOUT), mask=gl.expand_dims(valid, 1))
    else:
        o_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
        row = first_row + o_row // GROUP
        head = kv_head * GROUP + o_row % GROUP
        valid = (row < num_rows) & (o_row < ROWS_PER_TILE * GROUP)
        offs_d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_out + head * D, 1) + gl.expand_dims(offs_d, 0)
        gl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(valid, 1))


@gluon.jit
def _fold(M, L, O, m, l, acc, L_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):
    """`attention.fold`."""
    top = gl.maximum(M, m)
    shift = gl.where(top == float("-inf"), 0.0, top)
    a = gl.exp2(M - shift)
    b = gl.exp2(m - shift)
    L = gl.fma(L, wide(a, L, L_LAYOUT), l * wide(b, l, L_LAYOUT))
    O = gl.fma(O, wide(a, O, O_LAYOUT), acc * wide(b, acc, O_LAYOUT))
    return top, L, O


@gluon.jit(do_not_specialize=["window"])
def prefill_hopper_kernel(
    q_ptr, kv_desc, out_ptr, tiles_ptr, table_ptr,
    window, scale_log2, stride_q, stride_out, stride_table, rows_per_block, rows_of_kv, rows_of_head,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr, SPLIT_KEYS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, LOOKAHEAD: gl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads): one tile of 128 rows from the list of `attention.list_tiles_kernel`.

    `rows_*` count rows of D.
    """
    ROWS_PER_TILE: gl.constexpr = 128 // GROUP
    tile_ptr = tiles_ptr + gl.program_id(0) * 8
    sequence = gl.load(tile_ptr)
    first_row = gl.load(tile_ptr + 1)
    row_start = gl.load(tile_ptr + 2)
    num_rows = gl.load(tile_ptr + 3)
    context = gl.load(tile_ptr + 4)
    first_id: gl.constexpr = 0
    if LOOKAHEAD:
        first_id = gl.load(tile_ptr + 5)
    if num_rows > 0:
        key_stop = gl.minimum(context - num_rows + first_row + ROWS_PER_TILE, context)
        first_block = _first_visible(context - num_rows + first_row, window) // BLOCK_KV
        num_blocks = (key_stop + BLOCK_KV - 1) // BLOCK_KV - first_block
        kv_head = gl.program_id(1)

        q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        q_shared = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, D], q_layout)
        k_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK_KV, D], kv_desc.layout)
        v_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK_KV, D], kv_desc.layout)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        table = table_ptr + sequence.to(gl.int64) * stride_table
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q_ptr, out_ptr, q_shared, k_ring, v_ring, k_ready, v_ready, k_free, v_free, first_block,
                        num_blocks, row_start, num_rows, context, first_row, kv_head, window, scale_log2, stride_q,
                        stride_out,
                        gl.constexpr(0), GROUP, gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, STAGES,
                    ),
                ),
                (
                    _consume,
                    (
                        q_ptr, out_ptr, q_shared, k_ring, v_ring, k_ready, v_ready, k_free, v_free, first_block,
                        num_blocks, row_start, num_rows, context, first_row, kv_head, window, scale_log2, stride_q,
                        stride_out,
                        gl.constexpr(1), GROUP, gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, STAGES,
                    ),
                ),
                (
                    _produce,
                    (
                        kv_desc, table, k_ring, v_ring, k_ready, v_ready, k_free, v_free, first_block, num_blocks,
                        kv_head * rows_of_head, rows_per_block, rows_of_kv, first_id, BLOCK_KV, BLOCK_SIZE, STAGES,
                        LOOKAHEAD,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
