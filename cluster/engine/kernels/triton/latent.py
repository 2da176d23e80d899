"""Latent attention over the paged cache: all heads of a token read one row of L + R numbers.

Shape legend: T rows, B sequences, H query heads, L latent size (keys and values), R rotated size (keys only),
S tokens in a cache block. Heads are taken GROUP at a time; they share K and V, so a group is to these kernels
what the heads of one KV head are to those of `attention.py`.

The definition is that of `attention.py`, with this score and this value:

    s = one fp32 chain over the L latent dimensions, then on over the R rotated ones, each ascending
    v = the first L numbers of the row

Splits of SPLIT_KEYS, blocks of BLOCK_KV, lane sums and fold are the same. Every column of the value is a chain
of its own, so a launch may compute all of them (VALUE = 0) or only the first or second half (1, 2), where a whole
row of them would not fit into registers; the scores are the same each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.attention import accumulate, fold, probabilities, total
from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def key_places(
    table_ptr, start, key_stop, stride_block, ROW: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Of keys start : start + BLOCK_KV, where their rows begin, their positions, and whether they may be read."""
    offs = tl.arange(0, BLOCK_KV)
    key_pos = start + offs
    keep = key_pos < key_stop
    if BLOCK_SIZE % BLOCK_KV == 0:
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        place = block * stride_block + (start % BLOCK_SIZE + offs) * ROW
    else:
        block = tl.load(table_ptr + key_pos // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
        place = block * stride_block + (key_pos % BLOCK_SIZE) * ROW
    return place, key_pos, keep


@triton.jit
def load_part(ptr, place, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Columns FIRST : FIRST + WIDTH of the rows that begin at `place`; 0 from END on and where `keep` is false."""
    offs = FIRST + tl.arange(0, WIDTH)
    return tl.load(ptr + place[:, None] + offs[None, :], mask=keep[:, None] & (offs < END)[None, :], other=0.0)


@triton.jit
def load_queries(
    q_ptr, q_rope_ptr, row, head, valid, stride_q, stride_rope,
    L: tl.constexpr, BLOCK_L: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """The latent part, in one piece or two (else the second is the first), and the rotated one."""
    row = row.to(tl.int64)
    place = row * stride_q + head * L
    q_rope = load_part(q_rope_ptr, row * stride_rope + head * R, valid, 0, BLOCK_R, R)
    if VALUE == 0:
        q = load_part(q_ptr, place, valid, 0, BLOCK_L, L)
        q_second = q
    else:
        HALF: tl.constexpr = BLOCK_L // 2
        q = load_part(q_ptr, place, valid, 0, HALF, L)
        q_second = load_part(q_ptr, place, valid, HALF, HALF, L)
    return q, q_second, q_rope


@triton.jit
def block_scores(
    q, q_second, q_rope, kv_ptr, place, keep,
    L: tl.constexpr, BLOCK_L: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Scores (rows, keys), and the values (keys, all or a half of BLOCK_L). One chain in either case."""
    turned = load_part(kv_ptr, place + L, keep, 0, BLOCK_R, R)
    if VALUE == 0:
        v = load_part(kv_ptr, place, keep, 0, BLOCK_L, L)
        s = tl.dot(q, tl.trans(v))
    else:
        HALF: tl.constexpr = BLOCK_L // 2
        first = load_part(kv_ptr, place, keep, 0, HALF, L)
        second = load_part(kv_ptr, place, keep, HALF, HALF, L)
        s = tl.dot(q_second, tl.trans(second), tl.dot(q, tl.trans(first)))
        if VALUE == 1:
            v = first
        else:
            v = second
    return tl.dot(q_rope, tl.trans(turned), s), v


@triton.jit(do_not_specialize=["num_sequences", "max_rows"])
def latent_split_kernel(
    q_ptr, q_rope_ptr, kv_ptr, out_ptr, partial_ptr, partial_m_ptr, partial_l_ptr, records_ptr, firsts_ptr,
    table_ptr, num_sequences, max_rows, scale_log2, stride_q, stride_rope, stride_out, stride_table, stride_block,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, VALUE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Few rows, many keys: one (sequence, split, group of heads) at a time, from `attention.list_splits_kernel`.

    Partial results lie where `attention.fold_kernel` looks for them, as if groups were KV heads. A sequence of
    one split is folded here and goes to the result.
    """
    begin(PDL)
    BLOCK_V: tl.constexpr = BLOCK_L if VALUE == 0 else BLOCK_L // 2
    FIRST_V: tl.constexpr = BLOCK_V if VALUE == 2 else 0
    num_items = tl.load(firsts_ptr + num_sequences) * NUM_GROUPS
    tile_row = tl.arange(0, BLOCK_ROWS)
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        group = item % NUM_GROUPS
        record_ptr = records_ptr + item // NUM_GROUPS * 8
        sequence = tl.load(record_ptr)
        split = tl.load(record_ptr + 1)
        row_start = tl.load(record_ptr + 2)
        num_rows = tl.load(record_ptr + 3)
        context = tl.load(record_ptr + 4)

        row = tile_row // GROUP
        head = group * GROUP + tile_row % GROUP
        valid = row < num_rows
        q, q_second, q_rope = load_queries(
            q_ptr, q_rope_ptr, row_start + row, head, valid, stride_q, stride_rope, L, BLOCK_L, R, BLOCK_R, VALUE
        )
        q_pos = tl.where(valid, context - num_rows + row, context - 1)

        m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
        sequence_table = table_ptr + sequence.to(tl.int64) * stride_table
        first_key = split * SPLIT_KEYS
        for start in tl.range(first_key, tl.minimum(first_key + SPLIT_KEYS, context), BLOCK_KV):
            place, key_pos, keep = key_places(sequence_table, start, context, stride_block, L + R, BLOCK_KV, BLOCK_SIZE)
            s, v = block_scores(q, q_second, q_rope, kv_ptr, place, keep, L, BLOCK_L, R, BLOCK_R, VALUE)
            m, alpha, p = probabilities(s, q_pos, key_pos, m, scale_log2, None, True)
            l, acc = accumulate(p, v, alpha, l, acc)

        offs_v = FIRST_V + tl.arange(0, BLOCK_V)
        keep_out = valid[:, None] & (offs_v < L)[None, :]
        if context <= SPLIT_KEYS:
            M = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            M, sums, O = fold(M, tl.zeros_like(l), tl.zeros_like(acc), m, l, acc)
            y = tl.math.div_rn(O, tl.broadcast_to(total(sums)[:, None], O.shape)) + 0.0
            target = out_ptr + ((row_start + row).to(tl.int64) * stride_out + head * L)[:, None] + offs_v[None, :]
            tl.store(target, y.to(out_ptr.dtype.element_ty), mask=keep_out)
        else:
            scratch_row = item * (max_rows * GROUP) + tile_row.to(tl.int64)
            tl.store(partial_ptr + scratch_row[:, None] * L + offs_v[None, :], acc, mask=keep_out)
            if FIRST_V == 0:
                tl.store(partial_m_ptr + scratch_row, m, mask=valid)
                lanes = tl.arange(0, 8)
                tl.store(partial_l_ptr + scratch_row[:, None] * 8 + lanes[None, :], l, mask=valid[:, None])


@triton.jit
def latent_prefill_kernel(
    q_ptr, q_rope_ptr, kv_ptr, out_ptr, tiles_ptr, table_ptr,
    scale_log2, stride_q, stride_rope, stride_out, stride_table, stride_block,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Many rows: one tile of (rows, GROUP heads) per program, all its splits in turn. Tiles come from
    `attention.list_tiles_kernel`."""
    BLOCK_V: tl.constexpr = BLOCK_L if VALUE == 0 else BLOCK_L // 2
    FIRST_V: tl.constexpr = BLOCK_V if VALUE == 2 else 0
    ROWS_PER_TILE: tl.constexpr = BLOCK_ROWS // GROUP
    group = tl.program_id(1)
    tile_ptr = tiles_ptr + tl.program_id(0) * 8
    num_rows = tl.load(tile_ptr + 3)
    if num_rows > 0:
        sequence = tl.load(tile_ptr)
        first_row = tl.load(tile_ptr + 1)
        row_start = tl.load(tile_ptr + 2)
        context = tl.load(tile_ptr + 4)

        tile_row = tl.arange(0, BLOCK_ROWS)
        row = first_row + tile_row // GROUP
        head = group * GROUP + tile_row % GROUP
        valid = (row < num_rows) & (tile_row < ROWS_PER_TILE * GROUP)
        q, q_second, q_rope = load_queries(
            q_ptr, q_rope_ptr, row_start + row, head, valid, stride_q, stride_rope, L, BLOCK_L, R, BLOCK_R, VALUE
        )
        first_pos = context - num_rows + first_row
        q_pos = first_pos + tl.minimum(tile_row // GROUP, num_rows - 1 - first_row)
        key_stop = tl.minimum(first_pos + ROWS_PER_TILE, context)

        M = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        O = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
        m = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
        sequence_table = table_ptr + sequence.to(tl.int64) * stride_table
        for start in tl.range(0, key_stop, BLOCK_KV):
            place, key_pos, keep = key_places(
                sequence_table, start, key_stop, stride_block, L + R, BLOCK_KV, BLOCK_SIZE
            )
            s, v = block_scores(q, q_second, q_rope, kv_ptr, place, keep, L, BLOCK_L, R, BLOCK_R, VALUE)
            before = tl.where(start % SPLIT_KEYS == 0, float("-inf"), m)
            top, alpha, p = probabilities(s, q_pos, key_pos, before, scale_log2, None, True)
            if start % SPLIT_KEYS == 0:  # alpha is 0 there, which also clears l and acc for the new split
                M, sums, O = fold(M, sums, O, m, l, acc)
            m = top
            l, acc = accumulate(p, v, alpha, l, acc)
        M, sums, O = fold(M, sums, O, m, l, acc)
        y = tl.math.div_rn(O, tl.broadcast_to(total(sums)[:, None], O.shape)) + 0.0
        offs_v = FIRST_V + tl.arange(0, BLOCK_V)
        target = out_ptr + ((row_start + row).to(tl.int64) * stride_out + head * L)[:, None] + offs_v[None, :]
        tl.store(target, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (offs_v < L)[None, :])
