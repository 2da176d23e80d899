"""Causal attention over the paged cache: one definition for prefill, chunked prefill and decode.

Shape legend: T rows, B sequences, H query heads, G KV heads, R = H / G heads that share K and V,
D head size, S tokens in a cache block.

The definition, per (row, query head), which every kernel here computes to the same bits:

    keys come in splits of SPLIT_KEYS, counted from position 0; a split in blocks of BLOCK_KV;
    block:  s = q·k;  m' = max(m, max(s)·c);  p = exp2(fma(s, c, -m'))      (c = scale · log2 e)
            l = fma(l, exp2(m - m'), Σp);  acc = acc·exp2(m - m') + p·v, p rounded to the element type
    split:  starts from m = -inf, l = 0, acc = 0
    fold:   splits ascending, M' = max(M, m);  L = fma(L, a, l·b);  O = fma(O, a, acc·b)
            with a = exp2(M - M'), b = exp2(m - M');  result O / ΣL

p·v is a tensor core chain in ascending key order. l and L have 8 lanes: lane c sums the keys of a
block whose number is c modulo 8 by a binary tree written out in `lane_sums`, and ΣL is the same tree
over the lanes; a sum left to the compiler would follow the tile shape. Keys past the end of a sequence
are not read; their V counts as 0, because a stale page may hold NaN.

With a sliding window a row sees its last `window` keys only; splits and blocks stay where they are. A
masked block changes nothing, so programs may skip it or not: before the first seen key m = -inf, which
the exponents take as 0, so that l, acc and both factors are 0 and the next block or split starts as if
it were the first; after it m' = m, so the factor is 1 and p is 0. A `window` of None is known when a
kernel is compiled and leaves nothing of this in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def pair_sums(x):
    """(rows, n, 2k) -> (rows, n, k): neighbours along the last axis added. One level of a tree."""
    left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
    return left + right


@triton.jit
def lane_sums(p):
    """(rows, keys) -> (rows, 8): lane c adds p[:, c], p[:, c + 8], ... pairwise, as a balanced tree.

    In a tensor core accumulator those keys lie in one thread, so no data moves.
    """
    x = tl.permute(tl.reshape(p, (p.shape[0], p.shape[1] // 8, 8)), (0, 2, 1))
    if p.shape[1] >= 128:
        x = pair_sums(x)
    if p.shape[1] >= 64:
        x = pair_sums(x)
    if p.shape[1] >= 32:
        x = pair_sums(x)
    if p.shape[1] >= 16:
        x = pair_sums(x)
    return tl.reshape(x, (p.shape[0], 8))


@triton.jit
def total(L):
    """(rows, 8) -> (rows,): the same tree over the lanes."""
    x = pair_sums(pair_sums(pair_sums(tl.reshape(L, (L.shape[0], 1, 8)))))
    return tl.reshape(x, (L.shape[0],))


@triton.jit
def fold(M, L, O, m, l, acc):
    """Join the next split onto the folded ones. A split that saw no key (m = -inf) changes nothing."""
    top = tl.maximum(M, m)
    shift = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2(M - shift)
    b = tl.exp2(m - shift)
    L = tl.fma(L, tl.broadcast_to(a[:, None], L.shape), l * b[:, None])
    O = tl.fma(O, tl.broadcast_to(a[:, None], O.shape), acc * b[:, None])
    return top, L, O


@triton.jit
def first_visible(position, window):
    """The first key that the row at `position` sees."""
    first = 0
    if window is not None:
        first = tl.maximum(position - window + 1, 0)
    return first


@triton.jit
def probabilities(s, q_pos, key_pos, m, scale_log2, window, MASKED: tl.constexpr):
    """(new maximum, exp2(old - new), p) of one block of scores. -inf stands for no key seen yet."""
    if MASKED:
        visible = key_pos[None, :] <= q_pos[:, None]
        if window is not None:
            visible = visible & (key_pos[None, :] > q_pos[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, axis=1) * scale_log2)
    shift = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
    factor = tl.full(s.shape, 0.0, tl.float32) + scale_log2
    p = tl.exp2(tl.fma(s, factor, tl.broadcast_to(-shift[:, None], s.shape)))
    return top, tl.exp2(m - shift), p


@triton.jit
def accumulate(p, v, alpha, l, acc):
    l = tl.fma(l, tl.broadcast_to(alpha[:, None], l.shape), lane_sums(p))
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return l, acc


@triton.jit
def load_block(
    kv_ptr, table_ptr, start, key_stop, stride_block, stride_kv, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K (transposed) and V of keys start : start + BLOCK_KV of one head through the block table."""
    offs_kv = tl.arange(0, BLOCK_KV)
    offs_d = tl.arange(0, BLOCK_D)
    key_pos = start + offs_kv
    keep = key_pos < key_stop
    if BLOCK_SIZE % BLOCK_KV == 0:
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        place = block * stride_block + (start % BLOCK_SIZE + offs_kv) * D
    else:
        block = tl.load(table_ptr + key_pos // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
        place = block * stride_block + (key_pos % BLOCK_SIZE) * D
    k_ptrs = kv_ptr + place[None, :] + offs_d[:, None]
    v_ptrs = kv_ptr + stride_kv + place[:, None] + offs_d[None, :]
    if D == BLOCK_D:
        if MASKED:
            k = tl.load(k_ptrs, mask=keep[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=keep[:, None], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
    else:
        in_head = offs_d < D
        k = tl.load(k_ptrs, mask=keep[None, :] & in_head[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=keep[:, None] & in_head[None, :], other=0.0)
    return k, v, key_pos


@triton.jit
def find_item(counts_ends, index):
    """Which sequence the work item belongs to: the number of sequences that end at or before it."""
    return tl.sum((counts_ends <= index).to(tl.int32), axis=0)


@triton.jit
def count_splits(
    query_start_ptr, context_len_ptr, num_sequences, max_rows, window, SPLIT_KEYS: tl.constexpr, BLOCK_B: tl.constexpr
):
    """(BLOCK_B,) number of splits that any row of each sequence sees and the split kernels serve, 0 for the others."""
    sequence = tl.arange(0, BLOCK_B)
    keep = sequence < num_sequences
    first = tl.load(query_start_ptr + sequence, mask=keep, other=0)
    last = tl.load(query_start_ptr + sequence + 1, mask=keep, other=0)
    context = tl.load(context_len_ptr + sequence, mask=keep, other=0)
    rows = last - first
    serves = (rows > 0) & (rows <= max_rows)
    seen = tl.cdiv(context, SPLIT_KEYS) - first_visible(context - rows, window) // SPLIT_KEYS
    return tl.where(serves, seen, 0)


@triton.jit(do_not_specialize=["num_sequences", "max_rows", "window"])
def list_splits_kernel(
    records_ptr, firsts_ptr, query_start_ptr, context_len_ptr, num_sequences, max_rows, window,
    SPLIT_KEYS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The work of `split_kernel`, one record per program: sequence, split, the sequence's first row of the step,
    its rows, its context. Once per step instead of in every program of every layer.

    `firsts[b]` is the place of sequence b's first record, `firsts[B]` the number of records. Splits that no row
    sees are not listed.
    """
    splits = count_splits(query_start_ptr, context_len_ptr, num_sequences, max_rows, window, SPLIT_KEYS, BLOCK_B)
    ends = tl.cumsum(splits, axis=0)
    sequences = tl.arange(0, BLOCK_B)
    index = tl.program_id(0)
    if index == 0:
        tl.store(firsts_ptr + sequences, ends - splits, mask=sequences < num_sequences)
        tl.store(firsts_ptr + num_sequences, tl.sum(splits, axis=0))
    if index < tl.sum(splits, axis=0):
        sequence = find_item(ends, index)
        place = index - tl.sum(tl.where(sequences < sequence, splits, 0), axis=0)
        row_start = tl.load(query_start_ptr + sequence)
        num_rows = tl.load(query_start_ptr + sequence + 1) - row_start
        context = tl.load(context_len_ptr + sequence)
        record_ptr = records_ptr + index * 8
        tl.store(record_ptr, sequence)
        tl.store(record_ptr + 1, first_visible(context - num_rows, window) // SPLIT_KEYS + place)
        tl.store(record_ptr + 2, row_start)
        tl.store(record_ptr + 3, num_rows)
        tl.store(record_ptr + 4, context)


@triton.jit
def turned(row_ptr, heads, keep, angles_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(heads, BLOCK_D) of one row, rotated by its position's angles: as `rope.rope_cache_kernel` has it."""
    HALF: tl.constexpr = D // 2
    offs_d = tl.arange(0, BLOCK_D)
    in_low = offs_d < HALF
    keep = keep[:, None] & (offs_d < D)[None, :]
    x = tl.load(row_ptr + (heads * D)[:, None] + offs_d[None, :], mask=keep, other=0.0).to(tl.float32)
    offs_other = tl.where(in_low, offs_d + HALF, offs_d - HALF)
    other = tl.load(row_ptr + (heads * D)[:, None] + offs_other[None, :], mask=keep, other=0.0).to(tl.float32)
    angles = angles_ptr + tl.where(in_low, offs_d, offs_d - HALF)
    cos = tl.load(angles, mask=offs_d < D, other=0.0)
    sin = tl.load(angles + HALF, mask=offs_d < D, other=0.0)
    crossed = other * tl.broadcast_to(sin[None, :], other.shape)
    crossed = tl.where(in_low[None, :], -crossed, crossed)
    return tl.fma(x, tl.broadcast_to(cos[None, :], x.shape), crossed)


@triton.jit
def store_kv(
    head_ptr, row_ptr, angles_ptr, slot, kv_head, stride_block, stride_kv, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The row's own K, rotated, and V of one head."""
    offs_d = tl.arange(0, BLOCK_D)
    head = tl.zeros((1,), tl.int32) + NUM_HEADS + kv_head
    is_stored = tl.zeros((1,), tl.int32) + (slot >= 0).to(tl.int32) > 0
    keep = is_stored[:, None] & (offs_d < D)[None, :]
    k = turned(row_ptr, head, is_stored, angles_ptr, D, BLOCK_D)
    v = tl.load(row_ptr + ((head + NUM_KV_HEADS) * D)[:, None] + offs_d[None, :], mask=keep, other=0.0).to(tl.float32)
    place = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * D
    target = head_ptr + place + tl.zeros((1, 1), tl.int64) + offs_d[None, :]
    tl.store(target, k.to(head_ptr.dtype.element_ty), mask=keep)
    tl.store(target + stride_kv, v.to(head_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_sequences", "max_rows", "window"])
def split_kernel(
    q_ptr, kv_ptr, out_ptr, partial_ptr, partial_m_ptr, partial_l_ptr, records_ptr, firsts_ptr, table_ptr,
    cos_sin_ptr, slot_ptr, num_sequences, max_rows, window, scale_log2, stride_q, stride_out, stride_table,
    stride_block, stride_kv, stride_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TAKES_ROPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Few rows, many keys: one (sequence, split, KV head) at a time, partial results to scratch.

    The list of work is on the device, so the grid is fixed and the kernel can be captured. Partials of item i
    lie at i: (max_rows · GROUP, D) values, m, and (.., 8) l. A sequence of one split is folded here and goes to
    the result: `fold_kernel` leaves it alone.

    TAKES_ROPE: single rows, of which q_ptr has qkv, heads of q first, before they are rotated. The program of the split
    that the row's own key belongs to stores it before it reads the block.
    """
    begin(PDL)
    num_items = tl.load(firsts_ptr + num_sequences) * NUM_KV_HEADS
    tile_row = tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        record_ptr = records_ptr + item // NUM_KV_HEADS * 8
        sequence = tl.load(record_ptr)
        split = tl.load(record_ptr + 1)
        row_start = tl.load(record_ptr + 2)
        num_rows = tl.load(record_ptr + 3)
        context = tl.load(record_ptr + 4)
        first_seen = first_visible(context - num_rows, window)
        first_split = first_seen // SPLIT_KEYS

        row = tile_row // GROUP
        head = kv_head * GROUP + tile_row % GROUP
        valid = row < num_rows
        head_ptr = kv_ptr + kv_head * stride_head
        if TAKES_ROPE:
            row_ptr = q_ptr + row_start.to(tl.int64) * stride_q
            angles_ptr = cos_sin_ptr + (context - 1).to(tl.int64) * D
            if (context - 1) // SPLIT_KEYS == split:
                store_kv(
                    head_ptr, row_ptr, angles_ptr, tl.load(slot_ptr + row_start), kv_head, stride_block, stride_kv,
                    NUM_KV_HEADS * GROUP, NUM_KV_HEADS, D, BLOCK_D, BLOCK_SIZE,
                )  # fmt: skip
                tl.debug_barrier()  # the program's other threads read it
            q = turned(row_ptr, head, valid, angles_ptr, D, BLOCK_D).to(kv_ptr.dtype.element_ty)
        else:
            q_ptrs = q_ptr + (row_start + row).to(tl.int64)[:, None] * stride_q + head[:, None] * D + offs_d[None, :]
            q = tl.load(q_ptrs, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
        q_pos = tl.where(valid, context - num_rows + row, context - 1)

        m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
        sequence_table = table_ptr + sequence.to(tl.int64) * stride_table
        first_key = split * SPLIT_KEYS
        stop = tl.minimum(first_key + SPLIT_KEYS, context)
        if window is not None:
            first_key = tl.maximum(first_key, first_seen // BLOCK_KV * BLOCK_KV)
        for start in tl.range(first_key, stop, BLOCK_KV):
            k, v, key_pos = load_block(
                head_ptr,
                sequence_table,
                start,
                context,
                stride_block,
                stride_kv,
                D,
                BLOCK_D,
                BLOCK_KV,
                BLOCK_SIZE,
                True,
            )
            m, alpha, p = probabilities(tl.dot(q, k), q_pos, key_pos, m, scale_log2, window, True)
            l, acc = accumulate(p, v, alpha, l, acc)

        keep = valid[:, None] & (offs_d < D)[None, :]
        if context - first_split * SPLIT_KEYS <= SPLIT_KEYS:
            M = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            M, L, O = fold(M, tl.zeros_like(l), tl.zeros_like(acc), m, l, acc)
            y = tl.math.div_rn(O, tl.broadcast_to(total(L)[:, None], O.shape)) + 0.0
            target = (
                out_ptr + (row_start + row).to(tl.int64)[:, None] * stride_out + head[:, None] * D + offs_d[None, :]
            )
            tl.store(target, y.to(out_ptr.dtype.element_ty), mask=keep)
        else:
            scratch_row = item * (max_rows * GROUP) + tile_row.to(tl.int64)
            tl.store(partial_ptr + scratch_row[:, None] * D + offs_d[None, :], acc, mask=keep)
            tl.store(partial_m_ptr + scratch_row, m, mask=valid)
            lanes = tl.arange(0, 8)
            tl.store(partial_l_ptr + scratch_row[:, None] * 8 + lanes[None, :], l, mask=valid[:, None])


@triton.jit(do_not_specialize=["max_rows", "window"])
def fold_kernel(
    out_ptr, partial_ptr, partial_m_ptr, partial_l_ptr, firsts_ptr, query_start_ptr, context_len_ptr,
    max_rows, window, stride_out,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Left fold over the splits of one (row, query head), ascending, where there are several."""
    begin(PDL)
    sequence = tl.program_id(0)
    row = tl.program_id(1) // (NUM_KV_HEADS * GROUP)
    head = tl.program_id(1) % (NUM_KV_HEADS * GROUP)
    row_start = tl.load(query_start_ptr + sequence)
    num_rows = tl.load(query_start_ptr + sequence + 1) - row_start
    context = tl.load(context_len_ptr + sequence)
    num_splits = tl.cdiv(context, SPLIT_KEYS) - first_visible(context - num_rows, window) // SPLIT_KEYS
    if (num_rows <= max_rows) & (row < num_rows) & (num_splits > 1):
        before = tl.load(firsts_ptr + sequence)
        offs_d = tl.arange(0, BLOCK_D)
        tile_row = row * GROUP + head % GROUP
        # Loads run ahead of the fold through shared memory, of which wide heads would take too much.
        AT_ONCE: tl.constexpr = 4 if BLOCK_D <= 256 else 8
        STAGES: tl.constexpr = 4 if BLOCK_D <= 256 else 1
        M = tl.full((1,), float("-inf"), tl.float32)
        L = tl.zeros((1, 8), tl.float32)
        lanes = tl.arange(0, 8)
        O = tl.zeros((1, BLOCK_D), tl.float32)
        for first in tl.range(0, num_splits, AT_ONCE, num_stages=STAGES):
            for i in tl.static_range(AT_ONCE):
                split = first + i
                there = tl.zeros((1,), tl.int32) + split < num_splits  # m = -inf stands for a split that is not
                item = (before + split) * NUM_KV_HEADS + head // GROUP
                scratch_row = item.to(tl.int64) * (max_rows * GROUP) + tile_row
                m_ptrs = partial_m_ptr + scratch_row + tl.zeros((1,), tl.int32)
                m = tl.load(m_ptrs, mask=there, other=float("-inf"))
                l = tl.load(partial_l_ptr + scratch_row * 8 + lanes[None, :], mask=there[:, None], other=0.0)
                acc_ptrs = partial_ptr + scratch_row * D + offs_d[None, :]
                acc = tl.load(acc_ptrs, mask=there[:, None] & (offs_d < D)[None, :], other=0.0)
                M, L, O = fold(M, L, O, m, l, acc)
        y = tl.math.div_rn(O, tl.broadcast_to(total(L)[:, None], O.shape)) + 0.0
        out_row = out_ptr + (row_start + row).to(tl.int64) * stride_out + head * D
        tl.store(out_row + offs_d[None, :], y.to(out_ptr.dtype.element_ty), mask=(offs_d < D)[None, :])


@triton.jit
def masked_block(
    q, q_pos, M, L, O, m, l, acc, head_ptr, sequence_table, start, context, window, scale_log2, stride_block,
    stride_kv, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The next block of a tile, where not every row sees every key."""
    k, v, key_pos = load_block(
        head_ptr, sequence_table, start, context, stride_block, stride_kv, D, BLOCK_D, BLOCK_KV, BLOCK_SIZE, True
    )
    before = tl.where(start % SPLIT_KEYS == 0, float("-inf"), m)
    top, alpha, p = probabilities(tl.dot(q, k), q_pos, key_pos, before, scale_log2, window, True)
    if start % SPLIT_KEYS == 0:
        M, L, O = fold(M, L, O, m, l, acc)
    l, acc = accumulate(p, v, alpha, l, acc)
    return M, L, O, top, l, acc


@triton.jit(do_not_specialize=["num_sequences", "max_rows", "window"])
def prefill_kernel(
    q_ptr, kv_ptr, kv_desc, out_ptr, query_start_ptr, context_len_ptr, table_ptr,
    num_sequences, max_rows, window, scale_log2, stride_q, stride_out, stride_table, stride_block, stride_kv,
    stride_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Many rows: one tile of (rows, GROUP query heads of one KV head) per program, all its splits in turn.

    Serves sequences with more than max_rows rows. The last tiles of a sequence, which see the most
    keys, start first. Blocks that some rows see only in part, at the windows' beginnings and at the
    rows' own positions, are masked; those between them are not.
    """
    ROWS_PER_TILE: tl.constexpr = BLOCK_ROWS // GROUP
    sequences = tl.arange(0, BLOCK_B)
    keep_sequence = sequences < num_sequences
    first = tl.load(query_start_ptr + sequences, mask=keep_sequence, other=0)
    last = tl.load(query_start_ptr + sequences + 1, mask=keep_sequence, other=0)
    tiles = tl.where(last - first > max_rows, tl.cdiv(last - first, ROWS_PER_TILE), 0)
    num_tiles = tl.sum(tiles, axis=0)
    index = num_tiles - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    if index >= 0:
        sequence = find_item(tl.cumsum(tiles, axis=0), index)
        tile = index - tl.sum(tl.where(sequences < sequence, tiles, 0), axis=0)
        row_start = tl.load(query_start_ptr + sequence)
        num_rows = tl.load(query_start_ptr + sequence + 1) - row_start
        context = tl.load(context_len_ptr + sequence)

        tile_row = tl.arange(0, BLOCK_ROWS)
        offs_d = tl.arange(0, BLOCK_D)
        row = tile * ROWS_PER_TILE + tile_row // GROUP
        head = kv_head * GROUP + tile_row % GROUP
        valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
        q_ptrs = q_ptr + (row_start + row).to(tl.int64)[:, None] * stride_q + head[:, None] * D + offs_d[None, :]
        q = tl.load(q_ptrs, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
        first_pos = context - num_rows + tile * ROWS_PER_TILE
        q_pos = first_pos + tl.minimum(tile_row // GROUP, num_rows - 1 - tile * ROWS_PER_TILE)
        key_stop = tl.minimum(first_pos + ROWS_PER_TILE, context)
        full_stop = (first_pos + 1) // BLOCK_KV * BLOCK_KV

        M = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        L = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        O = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
        m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
        head_ptr = kv_ptr + kv_head * stride_head
        sequence_table = table_ptr + sequence.to(tl.int64) * stride_table
        full_start = 0
        if window is not None:
            first_block = first_visible(first_pos, window) // BLOCK_KV * BLOCK_KV
            last_window = first_visible(key_stop - 1, window)
            full_start = tl.minimum(tl.cdiv(last_window, BLOCK_KV) * BLOCK_KV, full_stop)
            for start in tl.range(first_block, full_start, BLOCK_KV, num_stages=1):
                M, L, O, m, l, acc = masked_block(
                    q, q_pos, M, L, O, m, l, acc, head_ptr, sequence_table, start, context, window, scale_log2,
                    stride_block, stride_kv, D, BLOCK_D, BLOCK_KV, SPLIT_KEYS, BLOCK_SIZE,
                )  # fmt: skip
        for start in tl.range(full_start, full_stop, BLOCK_KV):
            if USE_TMA:
                block = tl.load(sequence_table + start // BLOCK_SIZE)
                place = block * (stride_block // D) + kv_head * (stride_head // D) + start % BLOCK_SIZE
                k = kv_desc.load([place, 0]).T
                v = kv_desc.load([place + stride_kv // D, 0])
                key_pos = start + tl.arange(0, BLOCK_KV)
            else:
                k, v, key_pos = load_block(
                    head_ptr, sequence_table, start, key_stop, stride_block, stride_kv, D, BLOCK_D, BLOCK_KV,
                    BLOCK_SIZE, False,
                )  # fmt: skip
            before = tl.where(start % SPLIT_KEYS == 0, float("-inf"), m)
            top, alpha, p = probabilities(tl.dot(q, k), q_pos, key_pos, before, scale_log2, window, False)
            if start % SPLIT_KEYS == 0:  # alpha is 0 there, which also clears l and acc for the new split
                M, L, O = fold(M, L, O, m, l, acc)
            m = top
            l, acc = accumulate(p, v, alpha, l, acc)
        for start in tl.range(full_stop, key_stop, BLOCK_KV, num_stages=1):
            M, L, O, m, l, acc = masked_block(
                q, q_pos, M, L, O, m, l, acc, head_ptr, sequence_table, start, context, window, scale_log2,
                stride_block, stride_kv, D, BLOCK_D, BLOCK_KV, SPLIT_KEYS, BLOCK_SIZE,
            )  # fmt: skip
        M, L, O = fold(M, L, O, m, l, acc)
        y = tl.math.div_rn(O, tl.broadcast_to(total(L)[:, None], O.shape)) + 0.0
        out_ptrs = out_ptr + (row_start + row).to(tl.int64)[:, None] * stride_out + head[:, None] * D + offs_d[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["num_sequences", "max_rows"])
def list_tiles_kernel(
    tiles_ptr, query_start_ptr, context_len_ptr, num_sequences, max_rows, ROWS_PER_TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One record per program: sequence, first row in it, the sequence's first row of the step, its rows, its context.
    The first record also has the number of tiles, and a counter that starts at 0.

    Once per step instead of in every program of every layer. Sequences with more than max_rows rows have tiles,
    listed as `prefill_kernel` takes them; the records past the last tile have no rows.
    """
    sequences = tl.arange(0, BLOCK_B)
    keep_sequence = sequences < num_sequences
    first = tl.load(query_start_ptr + sequences, mask=keep_sequence, other=0)
    last = tl.load(query_start_ptr + sequences + 1, mask=keep_sequence, other=0)
    tiles = tl.where(last - first > max_rows, tl.cdiv(last - first, ROWS_PER_TILE), 0)
    index = tl.sum(tiles, axis=0) - 1 - tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(0) * 8
    if tl.program_id(0) == 0:
        tl.store(tile_ptr + 5, tl.sum(tiles, axis=0))
        tl.store(tile_ptr + 6, 0)
    if index >= 0:
        sequence = find_item(tl.cumsum(tiles, axis=0), index)
        tile = index - tl.sum(tl.where(sequences < sequence, tiles, 0), axis=0)
        row_start = tl.load(query_start_ptr + sequence)
        tl.store(tile_ptr, sequence)
        tl.store(tile_ptr + 1, tile * ROWS_PER_TILE)
        tl.store(tile_ptr + 2, row_start)
        tl.store(tile_ptr + 3, tl.load(query_start_ptr + sequence + 1) - row_start)
        tl.store(tile_ptr + 4, tl.load(context_len_ptr + sequence))
    else:
        tl.store(tile_ptr + 3, 0)
