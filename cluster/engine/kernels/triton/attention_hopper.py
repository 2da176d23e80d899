"""The tiled attention of `attention.py` written for Hopper's warp groups: same definition, same bits.

One producer warp moves K and V blocks through the bulk copy engine into a ring of buffers; two
consumer warp groups take 64 rows of the tile each, and each overlaps the softmax of block i with the
p·v product of block i - 1. Programs are persistent, so that the next tile's first blocks are under way
while this one's result is stored. Written in Gluon, which leaves layouts and waits to the author; Gluon is
experimental, so `launch` uses this only with the Triton versions it was tested with.

Shape legend as in `attention.py`. Blocks have BLOCK_KV keys and cache blocks are whole multiples.
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


@gluon.jit
def _pair_sums(x):
    left, right = gl.split(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return left + right


@gluon.jit
def _lane_sums(p):
    """`attention.lane_sums` of a (rows, 64) tile; the result's layout is the caller's business."""
    x = gl.permute(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), [0, 2, 1])
    x = _pair_sums(_pair_sums(_pair_sums(x)))
    return gl.reshape(x, [p.shape[0], 8])


@gluon.jit
def _total(L, layout: gl.constexpr):
    """`attention.total`: (rows, 8) -> (rows,) in a slice of `layout`."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    x = gl.reshape(gl.convert_layout(L, wide), [L.shape[0], 1, 8])
    x = gl.reshape(_pair_sums(_pair_sums(_pair_sums(x))), [L.shape[0]])
    return gl.convert_layout(x, gl.SliceLayout(1, layout))


@gluon.jit
def _wide(x, like, layout: gl.constexpr):
    """(rows,) in any layout -> (rows, n) like `like`, whose layout is `layout`."""
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return gl.expand_dims(x, 1) + gl.zeros_like(like)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _count_tiles(query_start_ptr, num_sequences, max_rows, ROWS_PER_TILE: gl.constexpr, BLOCK_B: gl.constexpr):
    """(BLOCK_B,) tiles of each sequence, 0 for those with at most max_rows rows."""
    sequences = gl.arange(0, BLOCK_B, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    exists = sequences < num_sequences
    first = gl.load(query_start_ptr + sequences, mask=exists, other=0)
    last = gl.load(query_start_ptr + sequences + 1, mask=exists, other=0)
    return sequences, gl.where(last - first > max_rows, (last - first + ROWS_PER_TILE - 1) // ROWS_PER_TILE, 0)


@gluon.jit
def _num_rounds(num_tiles, NUM_KV_HEADS: gl.constexpr):
    """How many tiles a program takes at most: one, or pairs of them where there are enough."""
    programs = gl.num_programs(0)
    items = num_tiles * NUM_KV_HEADS
    pairs = (num_tiles + 1) // 2 * NUM_KV_HEADS
    return gl.where(items <= 2 * programs, (items + programs - 1) // programs, (pairs + programs - 1) // programs * 2)


@gluon.jit
def _turn(round_index, num_tiles, NUM_KV_HEADS: gl.constexpr):
    """This program's (KV head, tile index) of a round; the index is -1 where there is none.

    A causal tile's work grows with its index, so index j is paired with index num_tiles - 1 - j: all
    pairs cost about the same, the longer tile first. Heads follow one another, so that the programs
    share one head's keys in L2.
    """
    programs = gl.num_programs(0)
    if num_tiles * NUM_KV_HEADS <= 2 * programs:
        item = round_index * programs + gl.program_id(0)
        kv_head = item // num_tiles
        index = gl.where(kv_head < NUM_KV_HEADS, num_tiles - 1 - item % num_tiles, -1)
    else:
        half = (num_tiles + 1) // 2
        pair = round_index // 2 * programs + gl.program_id(0)
        kv_head = pair // half
        low = pair % half
        high = num_tiles - 1 - low
        is_absent = (kv_head >= NUM_KV_HEADS) | ((round_index % 2 == 1) & (low == high))
        index = gl.where(is_absent, -1, gl.where(round_index % 2 == 0, high, low))
    return kv_head, index


@gluon.jit
def _locate(
    index, sequences, tiles, query_start_ptr, context_len_ptr, ROWS_PER_TILE: gl.constexpr, BLOCK_KV: gl.constexpr
):
    """Tile index -> (sequence, its first row, rows, context, first row of the tile, blocks to read)."""
    ends = gl.associative_scan(tiles, 0, _add)
    sequence = gl.sum((ends <= index).to(gl.int32), axis=0)
    tile = index - gl.sum(gl.where(sequences < sequence, tiles, 0), axis=0)
    row_start = gl.load(query_start_ptr + sequence)
    num_rows = gl.load(query_start_ptr + sequence + 1) - row_start
    context = gl.load(context_len_ptr + sequence)
    first_row = tile * ROWS_PER_TILE
    key_stop = gl.minimum(context - num_rows + first_row + ROWS_PER_TILE, context)
    num_blocks = (key_stop + BLOCK_KV - 1) // BLOCK_KV
    return sequence, row_start, num_rows, context, first_row, num_blocks


@gluon.jit
def _produce(
    kv_desc, table_ptr, query_start_ptr, context_len_ptr, k_ring, v_ring, k_ready, v_ready, k_free, v_free,
    num_sequences, max_rows, stride_table, rows_per_block, rows_of_kv, rows_of_head, NUM_KV_HEADS: gl.constexpr,
    ROWS_PER_TILE: gl.constexpr, BLOCK_KV: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_B: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings in the order the consumers read; a buffer is reused when both have freed it."""
    sequences, tiles = _count_tiles(query_start_ptr, num_sequences, max_rows, ROWS_PER_TILE, BLOCK_B)
    num_tiles = gl.sum(tiles, axis=0)
    fill = 0
    for round_index in range(_num_rounds(num_tiles, NUM_KV_HEADS)):
        kv_head, index = _turn(round_index, num_tiles, NUM_KV_HEADS)
        if index >= 0:
            sequence, row_start, num_rows, context, first_row, num_blocks = _locate(
                index, sequences, tiles, query_start_ptr, context_len_ptr, ROWS_PER_TILE, BLOCK_KV
            )
            table = table_ptr + sequence.to(gl.int64) * stride_table
            for i in range(num_blocks):
                stage = fill % STAGES
                free_phase = (fill // STAGES + 1) & 1
                start = i * BLOCK_KV
                block = gl.load(table + start // BLOCK_SIZE)
                place = block * rows_per_block + kv_head * rows_of_head + start % BLOCK_SIZE
                mbarrier.wait(k_free.index(stage), free_phase)
                mbarrier.expect(k_ready.index(stage), kv_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(kv_desc, [place, 0], k_ready.index(stage), k_ring.index(stage))
                mbarrier.wait(v_free.index(stage), free_phase)
                mbarrier.expect(v_ready.index(stage), kv_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    kv_desc, [place + rows_of_kv, 0], v_ready.index(stage), v_ring.index(stage)
                )
                fill += 1


@gluon.jit
def _softmax(s, q_pos, start, m, scale_log2, masked, S_LAYOUT: gl.constexpr, BLOCK_KV: gl.constexpr):
    """`attention.probabilities`, the mask decided at run time."""
    if masked:
        key_pos = start + gl.arange(0, BLOCK_KV, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(gl.expand_dims(key_pos, 0) <= gl.expand_dims(q_pos, 1), s, float("-inf"))
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
def _load_queries(
    q_ptr, q_buffer, row_start, num_rows, first_row, kv_head, stride_q, WHICH: gl.constexpr, GROUP: gl.constexpr,
    ROWS_PER_TILE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    row = first_row + tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, layout))
    offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_q + head * D, 1) + gl.expand_dims(offs_d, 0)
    q_buffer.store(gl.load(q_ptr + offsets, mask=gl.expand_dims(valid, 1), other=0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _store_rows(
    y, out_ptr, row_start, num_rows, first_row, kv_head, stride_out, O_LAYOUT: gl.constexpr, WHICH: gl.constexpr,
    GROUP: gl.constexpr, ROWS_PER_TILE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    tile_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    row = first_row + tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    offsets = gl.expand_dims((row_start + row).to(gl.int64) * stride_out + head * D, 1) + gl.expand_dims(offs_d, 0)
    gl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(valid, 1))


@gluon.jit
def _consume(
    q_ptr, out_ptr, query_start_ptr, context_len_ptr, q_shared, k_ring, v_ring, k_ready, v_ready, k_free, v_free,
    num_sequences, max_rows, scale_log2, stride_q, stride_out, WHICH: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr, ROWS_PER_TILE: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT_KEYS: gl.constexpr, BLOCK_B: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile: rows WHICH * 64 .. + 63, each (row of the sequence, query head)."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    BLOCKS_PER_SPLIT: gl.constexpr = SPLIT_KEYS // BLOCK_KV
    q_buffer = q_shared.index(WHICH)
    zeros_s = gl.zeros([64, BLOCK_KV], gl.float32, S_LAYOUT)
    minus = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    sequences, tiles = _count_tiles(query_start_ptr, num_sequences, max_rows, ROWS_PER_TILE, BLOCK_B)
    num_tiles = gl.sum(tiles, axis=0)
    base = 0  # blocks read so far: the producer counts the same
    for round_index in range(_num_rounds(num_tiles, NUM_KV_HEADS)):
        kv_head, index = _turn(round_index, num_tiles, NUM_KV_HEADS)
        if index >= 0:
            sequence, row_start, num_rows, context, first_row, num_blocks = _locate(
                index, sequences, tiles, query_start_ptr, context_len_ptr, ROWS_PER_TILE, BLOCK_KV
            )
            _load_queries(
                q_ptr, q_buffer, row_start, num_rows, first_row, kv_head, stride_q, WHICH, GROUP, ROWS_PER_TILE, D
            )
            s_row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
            q_pos = context - num_rows + gl.minimum(first_row + s_row // GROUP, num_rows - 1)
            first_pos = context - num_rows + first_row + WHICH * 64 // GROUP
            first_masked = (first_pos + 1) // BLOCK_KV  # blocks before it are seen whole by every row
            M = minus
            L = gl.zeros([64, 8], gl.float32, L_LAYOUT)
            O = gl.zeros([64, D], gl.float32, O_LAYOUT)
            acc = gl.zeros([64, D], gl.float32, O_LAYOUT)

            mbarrier.wait(k_ready.index(base % STAGES), (base // STAGES) & 1)
            s = warpgroup_mma(q_buffer, k_ring.index(base % STAGES).permute([1, 0]), zeros_s, use_acc=False)
            gl.thread_barrier()
            mbarrier.arrive(k_free.index(base % STAGES), count=1)
            m, alpha, p = _softmax(s, q_pos, 0, minus, scale_log2, first_masked <= 0, S_LAYOUT, BLOCK_KV)
            l = gl.convert_layout(_lane_sums(p), L_LAYOUT)
            p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)

            for i in range(1, num_blocks):
                stage = (base + i) % STAGES
                previous = (base + i - 1) % STAGES
                mbarrier.wait(k_ready.index(stage), ((base + i) // STAGES) & 1)
                s_token = warpgroup_mma(
                    q_buffer, k_ring.index(stage).permute([1, 0]), zeros_s, use_acc=False, is_async=True
                )
                acc = acc * _wide(alpha, acc, O_LAYOUT)
                mbarrier.wait(v_ready.index(previous), ((base + i - 1) // STAGES) & 1)
                acc_token = warpgroup_mma(p_operand, v_ring.index(previous), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_token])
                gl.thread_barrier()
                mbarrier.arrive(k_free.index(stage), count=1)
                new_split = i % BLOCKS_PER_SPLIT == 0
                before = gl.where(new_split, minus, m)
                top, alpha, p = _softmax(
                    s, q_pos, i * BLOCK_KV, before, scale_log2, i >= first_masked, S_LAYOUT, BLOCK_KV
                )
                sums = gl.convert_layout(_lane_sums(p), L_LAYOUT)
                acc = warpgroup_mma_wait(0, deps=[acc_token])
                gl.thread_barrier()
                mbarrier.arrive(v_free.index(previous), count=1)
                if new_split:  # alpha is 0 here, which clears l and acc for the split that begins
                    M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)
                m = top
                l = gl.fma(l, _wide(alpha, l, L_LAYOUT), sums)
                p_operand = gl.convert_layout(p.to(q_ptr.dtype.element_ty), P_LAYOUT)

            last = base + num_blocks - 1
            mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
            if num_blocks * BLOCK_KV > context:
                _zero_stale_values(v_ring.index(last % STAGES), (num_blocks - 1) * BLOCK_KV, context, BLOCK_KV, D)
                gl.thread_barrier()
            acc = acc * _wide(alpha, acc, O_LAYOUT)
            acc = warpgroup_mma(p_operand, v_ring.index(last % STAGES), acc)
            gl.thread_barrier()
            mbarrier.arrive(v_free.index(last % STAGES), count=1)
            M, L, O = _fold(M, L, O, m, l, acc, L_LAYOUT, O_LAYOUT)
            y = gl.div_rn(O, gl.expand_dims(_total(L, O_LAYOUT), 1) + gl.zeros_like(O)) + 0.0
            _store_rows(
                y, out_ptr, row_start, num_rows, first_row, kv_head, stride_out, O_LAYOUT, WHICH, GROUP,
                ROWS_PER_TILE, D,
            )  # fmt: skip
            base += num_blocks


@gluon.jit
def _fold(M, L, O, m, l, acc, L_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):
    """`attention.fold`."""
    top = gl.maximum(M, m)
    shift = gl.where(top == float("-inf"), 0.0, top)
    a = gl.exp2(M - shift)
    b = gl.exp2(m - shift)
    L = gl.fma(L, _wide(a, L, L_LAYOUT), l * _wide(b, l, L_LAYOUT))
    O = gl.fma(O, _wide(a, O, O_LAYOUT), acc * _wide(b, acc, O_LAYOUT))
    return top, L, O


@gluon.jit(do_not_specialize=["num_sequences", "max_rows"])
def prefill_hopper_kernel(
    q_ptr, kv_desc, out_ptr, query_start_ptr, context_len_ptr, table_ptr,
    num_sequences, max_rows, scale_log2, stride_q, stride_out, stride_table, rows_per_block, rows_of_kv, rows_of_head,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_KV: gl.constexpr,
    SPLIT_KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_B: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Serves what `attention.prefill_kernel` serves, in tiles of 128 rows. `rows_*` count rows of D."""
    ROWS_PER_TILE: gl.constexpr = 128 // GROUP
    element: gl.constexpr = q_ptr.dtype.element_ty
    q_shared = gl.allocate_shared_memory(element, [2, 64, D], gl.NVMMASharedLayout(128, 16, 2))
    k_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_KV, D], kv_desc.layout)
    v_ring = gl.allocate_shared_memory(element, [STAGES, BLOCK_KV, D], kv_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_ptr, out_ptr, query_start_ptr, context_len_ptr, q_shared, k_ring, v_ring, k_ready, v_ready,
                    k_free, v_free, num_sequences, max_rows, scale_log2, stride_q, stride_out, gl.constexpr(0),
                    NUM_KV_HEADS, GROUP, gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, BLOCK_B, STAGES,
                ),
            ),
            (
                _consume,
                (
                    q_ptr, out_ptr, query_start_ptr, context_len_ptr, q_shared, k_ring, v_ring, k_ready, v_ready,
                    k_free, v_free, num_sequences, max_rows, scale_log2, stride_q, stride_out, gl.constexpr(1),
                    NUM_KV_HEADS, GROUP, gl.constexpr(ROWS_PER_TILE), D, BLOCK_KV, SPLIT_KEYS, BLOCK_B, STAGES,
                ),
            ),
            (
                _produce,
                (
                    kv_desc, table_ptr, query_start_ptr, context_len_ptr, k_ring, v_ring, k_ready, v_ready, k_free,
                    v_free, num_sequences, max_rows, stride_table, rows_per_block, rows_of_kv, rows_of_head,
                    NUM_KV_HEADS, gl.constexpr(ROWS_PER_TILE), BLOCK_KV, BLOCK_SIZE, BLOCK_B, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
