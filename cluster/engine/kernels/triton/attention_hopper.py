"""The tiled attention of `attention.py` written for Hopper's warp groups: same definition, same bits.

As many programs as multiprocessors work off a list of items (tile, KV head). One producer warp moves K and V blocks
through the bulk copy engine into rings of buffers, on from item to item; two consumer warp groups take 64 rows of the
tile each, and each overlaps the softmax of block i with the p·v product of block i - 1. The next item's q arrives while
this one's end is computed. Written in Gluon, which leaves layouts and waits to the author; a plan asks for it by name,
and every other plan gives the same bits.

Shape legend as in `attention.py`. Blocks have BLOCK_KV keys and cache blocks are whole multiples.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cluster.engine.kernels.triton.gluon_math import quotient
from cluster.engine.kernels.triton.gluon_names import async_load, barrier, copy_async
from cluster.engine.kernels.triton.gluon_rings import next_stage
from cluster.engine.kernels.triton.row_sums import lane_sums, total, wide

# Of the list's last items, which are claimed: a claim costs a microsecond, but with all of them shared out, programs
# would be idle at the end, since items differ in length.
_CLAIMED_ROUNDS = gl.constexpr(4)


@gluon.jit
def _first_visible(position, window):
    """`attention.first_visible`."""
    first = 0
    if window is not None:
        first = gl.maximum(position - window + 1, 0)
    return first


@gluon.jit
def _blocks(context, num_rows, first_row, window, ROWS_PER_TILE: gl.constexpr, BLOCK_KV: gl.constexpr):
    """(first block that any row of the tile sees, number of blocks)."""
    key_stop = gl.minimum(context - num_rows + first_row + ROWS_PER_TILE, context)
    first_block = _first_visible(context - num_rows + first_row, window) // BLOCK_KV
    return first_block, (key_stop + BLOCK_KV - 1) // BLOCK_KV - first_block


@gluon.jit
def _following(item, counter_ptr, num_items):
    """The item after this one: the first rounds are shared out, the last ones belong to whoever claims them.

    Each program claims until nothing is left, so the number of claims is known, and the last one sets the counter back
    for the next kernel that is given this list.
    """
    programs = gl.minimum(gl.num_programs(0), num_items)
    num_shared_out = gl.maximum(num_items // programs - _CLAIMED_ROUNDS, 1) * programs
    following = item + programs
    if following >= num_shared_out:
        num_claimed = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if num_claimed == num_items - num_shared_out + programs - 1:
            gl.store(counter_ptr, 0)
        following = num_shared_out + num_claimed
    return following


@gluon.jit
def _produce(
    kv_desc, tiles_ptr, table_ptr, k_ring, v_ring, next_item, k_ready, v_ready, k_free, v_free, item_ready, item_free,
    num_tiles, num_items, window, stride_table, rows_per_block, rows_of_kv, rows_of_head, ROWS_PER_TILE: gl.constexpr,
    BLOCK_KV: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Choose the items, and fill the rings in key order; a buffer is used again when both consumers have freed it."""
    ITEM_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    stage = 0
    phase = 1
    item_phase = 1
    item = gl.program_id(0)
    while item < num_items:
        tile_ptr = tiles_ptr + item % num_tiles * 8
        table = table_ptr + gl.load(tile_ptr).to(gl.int64) * stride_table
        first_block, num_blocks = _blocks(
            gl.load(tile_ptr + 4), gl.load(tile_ptr + 3), gl.load(tile_ptr + 1), window, ROWS_PER_TILE, BLOCK_KV
        )
        place_head = item // num_tiles * rows_of_head
        for block in range(first_block, first_block + num_blocks):
            start = block * BLOCK_KV
            place = gl.load(table + start // BLOCK_SIZE) * rows_per_block + place_head + start % BLOCK_SIZE
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), kv_desc.block_type.nbytes)
            async_load(kv_desc, [place, 0], k_ready.index(stage), k_ring.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), kv_desc.block_type.nbytes)
            async_load(kv_desc, [place + rows_of_kv, 0], v_ready.index(stage), v_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        following = _following(item, tiles_ptr + 6, num_items)
        mbarrier.wait(item_free, item_phase)
        next_item.store(gl.full([1], following, gl.int32, ITEM_LAYOUT))
        mbarrier.arrive(item_ready, count=1)
        item_phase ^= 1
        item = following


@gluon.jit
def _request_rows(
    q_ptr, q_buffer, tiles_ptr, item, num_tiles, stride_q, WHICH: gl.constexpr, GROUP: gl.constexpr,
    ROWS_PER_TILE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Ask for 64 rows of an item's q. Where there is none, the buffer keeps what it holds: nobody stores its result."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile_ptr = tiles_ptr + item % num_tiles * 8
    tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    row = gl.load(tile_ptr + 1) + tile_row // GROUP
    head = item // num_tiles * GROUP + tile_row % GROUP
    valid = (row < gl.load(tile_ptr + 3)) & (tile_row < ROWS_PER_TILE * GROUP)
    place = (gl.load(tile_ptr + 2) + row).to(gl.int64) * stride_q + head * D
    offsets = gl.expand_dims(place, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LAYOUT)), 0)
    copy_async(q_buffer, q_ptr + offsets, mask=gl.expand_dims(valid, 1))
    async_copy.commit_group()


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
    q_ptr, out_ptr, q_buffer, out_buffer, pin, tiles_ptr, k_ring, v_ring, next_item, k_ready, v_ready, k_free,
    v_free, item_ready, item_free, num_tiles, num_items, window, scale_log2, stride_q, stride_out,
    WHICH: gl.constexpr, GROUP: gl.constexpr, ROWS_PER_TILE: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT_KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile: rows WHICH * 64 .. + 63, each (row of the sequence, query head).

    The i-th block of a tile is number first_block + i of the sequence; none before it is seen by any row of the tile.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    OUT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    ITEM_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BLOCKS_PER_SPLIT: gl.constexpr = SPLIT_KEYS // BLOCK_KV
    zeros_s = gl.zeros([64, BLOCK_KV], gl.float32, S_LAYOUT)
    minus = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    stage = 0
    phase = 0
    item_phase = 0
    item = gl.program_id(0)
    _request_rows(q_ptr, q_buffer, tiles_ptr, item, num_tiles, stride_q, WHICH, GROUP, ROWS_PER_TILE, D)
    while item < num_items:
        tile_ptr = tiles_ptr + item % num_tiles * 8
        kv_head = item // num_tiles
        first_row = gl.load(tile_ptr + 1)
        row_start = gl.load(tile_ptr + 2)
        num_rows = gl.load(tile_ptr + 3)
        context = gl.load(tile_ptr + 4)
        first_block, num_blocks = _blocks(context, num_rows, first_row, window, ROWS_PER_TILE, BLOCK_KV)

        s_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
        q_pos = context - num_rows + gl.minimum(first_row + s_row // GROUP, num_rows - 1)
        first_pos = context - num_rows + first_row + WHICH * 64 // GROUP
        # Blocks from whole_from up to whole_to (counted from first_block) are seen whole by every row, others in part.
        whole_to = (first_pos + 1) // BLOCK_KV - first_block
        whole_from = 0
        if window is not None:
            last_pos = context - num_rows + gl.minimum(first_row + (WHICH * 64 + 63) // GROUP, num_rows - 1)
            whole_from = (_first_visible(last_pos, window) + BLOCK_KV - 1) // BLOCK_KV - first_block

        M = minus
        L = gl.zeros([64, 8], gl.float32, L_LAYOUT)
        O = gl.zeros([64, D], gl.float32, O_LAYOUT)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)

        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        mbarrier.wait(k_ready.index(stage), phase)
        s = warpgroup_mma(q_buffer, k_ring.index(stage).permute([1, 0]), zeros_s, use_acc=False)
        barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        masked = whole_to <= 0
        if window is not None:
            masked = masked | (whole_from > 0)
        m, alpha, p = _softmax(s, q_pos, first_block * BLOCK_KV, minus, scale_log2, masked, window, S_LAYOUT, BLOCK_KV)
        l = gl.convert_layout(lane_sums(p), L_LAYOUT)
        p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)
        v_stage = stage
        v_phase = phase
        stage, phase = next_stage(stage, phase, STAGES)

        for i in range(1, num_blocks):
            mbarrier.wait(k_ready.index(stage), phase)
            s_token = warpgroup_mma(
                q_buffer, k_ring.index(stage).permute([1, 0]), zeros_s, use_acc=False, is_async=True
            )  # fmt: skip
            acc = acc * wide(alpha, acc, O_LAYOUT)
            mbarrier.wait(v_ready.index(v_stage), v_phase)
            acc_token = warpgroup_mma(p_operand, v_ring.index(v_stage), acc, is_async=True)
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
            pin.store(sums)  # stores stay where they are: without one the assembler moves the softmax behind the wait
            acc, _ = warpgroup_mma_wait(0, deps=[acc_token, p_operand])
            barrier()
            mbarrier.arrive(v_free.index(v_stage), count=1)
            if new_split:  # alpha is 0 here, which clears l and acc for the split that begins
                M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)
            m = top
            l = gl.fma(l, wide(alpha, l, L_LAYOUT), sums)
            p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)
            v_stage = stage
            v_phase = phase
            stage, phase = next_stage(stage, phase, STAGES)

        # The last reader of q's buffer has ended, in all warps: the next q has the rest of this item to arrive in.
        mbarrier.wait(item_ready, item_phase)
        following = gl.sum(next_item.load(ITEM_LAYOUT), 0)
        barrier()
        mbarrier.arrive(item_free, count=1)
        item_phase ^= 1
        if following < num_items:
            _request_rows(q_ptr, q_buffer, tiles_ptr, following, num_tiles, stride_q, WHICH, GROUP, ROWS_PER_TILE, D)
        mbarrier.wait(v_ready.index(v_stage), v_phase)
        if (first_block + num_blocks) * BLOCK_KV > context:
            last_start = (first_block + num_blocks - 1) * BLOCK_KV
            _zero_stale_values(v_ring.index(v_stage), last_start, context, BLOCK_KV, D)
            barrier()
        acc = acc * wide(alpha, acc, O_LAYOUT)
        acc = warpgroup_mma(p_operand, v_ring.index(v_stage), acc)
        barrier()
        mbarrier.arrive(v_free.index(v_stage), count=1)
        M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)

        y = quotient(O, gl.expand_dims(total(L, O_LAYOUT), 1) + gl.zeros_like(O)) + 0.0
        if out_ptr.dtype.element_ty == q_ptr.dtype.element_ty:
            # Through shared memory, so that rows leave in pieces of 16 bytes.
            out_buffer.store(y.to(q_ptr.dtype.element_ty))
            barrier()
            tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT_LAYOUT))
            offs_d = gl.arange(0, D, gl.SliceLayout(0, OUT_LAYOUT))
            y = out_buffer.load(OUT_LAYOUT)
        else:
            tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
            offs_d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        row = first_row + tile_row // GROUP
        head = kv_head * GROUP + tile_row % GROUP
        valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
        offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_out + head * D, 1) + gl.expand_dims(offs_d, 0)
        gl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(valid, 1))
        item = following


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
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT_KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows from the list of `attention.list_tiles_kernel` for each KV head, claimed by the programs.

    `rows_*` count rows of D.
    """
    ROWS_PER_TILE: gl.constexpr = 128 // GROUP
    num_tiles = gl.load(tiles_ptr + 5)
    num_items = num_tiles * NUM_KV_HEADS
    if gl.program_id(0) < num_items:
        q_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        q_shared = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, D], q_layout)
        out_shared = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, 64, D], q_layout)
        k_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK_KV, D], kv_desc.layout)
        v_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK_KV, D], kv_desc.layout)
        pins = gl.allocate_shared_memory(gl.float32, [2, 64, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        next_item = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        item_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        item_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1)
            mbarrier.init(v_ready.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        mbarrier.init(item_ready, count=1)
        mbarrier.init(item_free, count=2)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q_ptr, out_ptr, q_shared.index(0), out_shared.index(0), pins.index(0), tiles_ptr, k_ring,
                        v_ring, next_item, k_ready, v_ready, k_free, v_free, item_ready, item_free, num_tiles,
                        num_items, window, scale_log2, stride_q, stride_out, gl.constexpr(0), GROUP,
                        gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, STAGES,
                    ),
                ),
                (
                    _consume,
                    (
                        q_ptr, out_ptr, q_shared.index(1), out_shared.index(1), pins.index(1), tiles_ptr, k_ring,
                        v_ring, next_item, k_ready, v_ready, k_free, v_free, item_ready, item_free, num_tiles,
                        num_items, window, scale_log2, stride_q, stride_out, gl.constexpr(1), GROUP,
                        gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, STAGES,
                    ),
                ),
                (
                    _produce,
                    (
                        kv_desc, tiles_ptr, table_ptr, k_ring, v_ring, next_item, k_ready, v_ready, k_free, v_free,
                        item_ready, item_free, num_tiles, num_items, window, stride_table, rows_per_block,
                        rows_of_kv, rows_of_head, gl.constexpr(ROWS_PER_TILE), BLOCK_KV, BLOCK_SIZE, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
