"""Mixture of experts: the choice, rows grouped by expert, a GEMM per expert, the weighted sum.

Shape legend: T rows, E experts held here, J experts of a row, P = T * J (row, expert) pairs; pair
t * J + j is the j-th expert of row t, experts ascending within a row; K and N inputs and outputs of a
layer; M rows of a tile.

Nothing goes to the host, so the grids cover the worst case and programs without work end at once. Each
output element is one fp32 chain over K, as in `linear.py`: it does not matter which tile a pair falls
into, at which place, or beside whom. No number is added up by atomics; counts and places of rows are
integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.linear import _sigmoid_weighted, _tile_of
from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def _exact_sum(p):
    """(rows, n) -> (rows,): numbers from 0 to 1 in whole steps of 2^-40. Integers have no order of addition."""
    steps = (p * 1099511627776.0).to(tl.int64)
    return tl.sum(steps, axis=1).to(tl.float32) * (1.0 / 1099511627776.0)


@triton.jit
def _divide(p, divisor):
    return tl.math.div_rn(p, tl.broadcast_to(divisor[:, None], p.shape))


@triton.jit(do_not_specialize=["num_rows"])
def route_kernel(
    logits_ptr, experts_ptr, weights_ptr, num_rows, stride_logits,
    E: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax, the J largest (of equal ones those of lower index), stored in the order of the index.

    A broken row (NaN or infinity among its logits) takes the first experts, with NaN weights.
    """
    begin(PDL)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    keep = (rows < num_rows)[:, None] & (offs_e < E)[None, :]
    source = logits_ptr + rows.to(tl.int64)[:, None] * stride_logits + offs_e[None, :]
    logits = tl.load(source, mask=keep, other=float("-inf"))
    e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    broken = tl.max((e != e).to(tl.int32), axis=1) > 0
    e = tl.where(broken[:, None], 0.0, e)
    p = _divide(e, tl.where(broken, 1.0, _exact_sum(e)))

    # One integer per expert: first its probability, whose bits are ordered as it is, then the index.
    ordered = p.to(tl.int32, bitcast=True).to(tl.int64)
    key = ordered * 4294967296 + (BLOCK_E - 1 - offs_e)[None, :]
    key = tl.where((offs_e < E)[None, :], key, -1)
    for _ in tl.static_range(J):
        key = tl.where(key == tl.max(key, axis=1)[:, None], -1, key)
    chosen = keep & (key == -1)
    if RENORMALISE:
        total = _exact_sum(tl.where(chosen, p, 0.0))
        p = _divide(p, tl.where(broken, 1.0, total))
    p = tl.where(broken[:, None], float("nan"), p)
    place = rows[:, None] * J + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    tl.store(experts_ptr + place, tl.broadcast_to(offs_e[None, :], place.shape), mask=chosen)
    tl.store(weights_ptr + place, p, mask=chosen)


@triton.jit
def _chosen(experts_ptr, rows, num_rows, first_expert, E, J: tl.constexpr, BLOCK_E: tl.constexpr):
    """(rows, BLOCK_E): 1 where the row chose the expert, else 0; and at which j."""
    offs_e = tl.arange(0, BLOCK_E)
    ones = tl.zeros((rows.shape[0], BLOCK_E), tl.int32)
    choice = tl.zeros((rows.shape[0], BLOCK_E), tl.int32)
    for j in tl.static_range(J):
        expert = tl.load(experts_ptr + rows * J + j, mask=rows < num_rows, other=-1) - first_expert
        expert = tl.where(expert < E, expert, -1)
        match = expert[:, None] == offs_e[None, :]
        ones = tl.where(match, 1, ones)
        choice = tl.where(match, j, choice)
    return ones, choice


@triton.jit(do_not_specialize=["num_rows", "first_expert"])
def count_kernel(
    experts_ptr, counts_ptr, num_rows, first_expert,
    E: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts[chunk, e]: how many rows of the chunk of BLOCK_T rows chose the expert."""
    begin(PDL)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ones, _ = _chosen(experts_ptr, rows, num_rows, first_expert, E, J, BLOCK_E)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.sum(ones, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "first_expert"])
def place_kernel(
    experts_ptr, counts_ptr, order_ptr, tile_expert_ptr, tile_rows_ptr, num_tiles_ptr, num_rows, num_chunks,
    first_expert,
    E: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pairs in the order of their expert, then of their row; each expert begins a tile of BLOCK_M places.

    order[place] is a pair. Tile i is places i * BLOCK_M and on, of which the first tile_rows[i] are used.
    """
    begin(PDL)
    chunk = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    totals = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in tl.range(0, num_chunks, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        source = counts_ptr + chunks[:, None] * BLOCK_E + offs_e[None, :]
        counts = tl.load(source, mask=(chunks < num_chunks)[:, None], other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), axis=0)
    tiles = (totals + (BLOCK_M - 1)) // BLOCK_M
    first_tile = tl.cumsum(tiles, axis=0) - tiles

    rows = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    ones, choice = _chosen(experts_ptr, rows, num_rows, first_expert, E, J, BLOCK_E)
    place = (first_tile * BLOCK_M + before)[None, :] + tl.cumsum(ones, axis=0) - 1
    tl.store(order_ptr + place, rows[:, None] * J + choice, mask=ones > 0)
    if chunk == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles, axis=0))
        for index in tl.range(0, tl.max(tiles, axis=0)):
            tl.store(tile_expert_ptr + first_tile + index, offs_e, mask=index < tiles)
            left = tl.minimum(totals - index * BLOCK_M, BLOCK_M)
            tl.store(tile_rows_ptr + first_tile + index, left, mask=index < tiles)


@triton.jit
def _load_w(
    w, row, column, N, K, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr, EVICT_FIRST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows row + column and on, of N, at k; columns past the end wrap around. (BLOCK_N, BLOCK_K) or TRANSPOSED."""
    if TMA:
        tile = w.load([row + column, k])
        if TRANSPOSED:
            tile = tile.T
    else:
        policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
        rows = w + (row + (column + tl.arange(0, BLOCK_N)) % N).to(tl.int64) * K
        cols = k + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            pointers = rows[None, :] + cols[:, None]
            in_k = (cols < K)[:, None]
        else:
            pointers = rows[:, None] + cols[None, :]
            in_k = (cols < K)[None, :]
        if EVEN_K:
            tile = tl.load(pointers, eviction_policy=policy)
        else:
            tile = tl.load(pointers, mask=in_k, other=0.0, eviction_policy=policy)
    return tile


@triton.jit
def _multiply(
    x, sources, reads, first_source, w, row, column, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, EVICT_FIRST: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N), or the other way round with SWAP: the chains of rows `sources` of x and of BLOCK_N
    rows of w from row + column on; with SILU_MUL silu(gate) * up, up being N rows behind gate.

    Rows of x whose `reads` is false are not read and count as 0. A descriptor reads x from first_source on.
    """
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        if X_TMA:
            a = x.load([first_source, k])
            if SWAP:
                a = a.T
        else:
            x_rows = x + sources.to(tl.int64) * K
            if SWAP:
                pointers = x_rows[None, :] + cols[:, None]
                keep = tl.broadcast_to(reads[None, :], pointers.shape)
                if not EVEN_K:
                    keep = keep & (cols < K)[:, None]
            else:
                pointers = x_rows[:, None] + cols[None, :]
                keep = tl.broadcast_to(reads[:, None], pointers.shape)
                if not EVEN_K:
                    keep = keep & (cols < K)[None, :]
            a = tl.load(pointers, mask=keep, other=0.0)
        b = _load_w(w, row, column, N, K, k, BLOCK_N, BLOCK_K, not SWAP, EVEN_K, EVICT_FIRST, W_TMA)
        if SWAP:
            acc = tl.dot(b, a, acc)
        else:
            acc = tl.dot(a, b, acc)
        if SILU_MUL:
            b_up = _load_w(w, row + N, column, N, K, k, BLOCK_N, BLOCK_K, not SWAP, EVEN_K, EVICT_FIRST, W_TMA)
            if SWAP:
                up = tl.dot(b_up, a, up)
            else:
                up = tl.dot(a, b_up, up)
    if SILU_MUL:
        acc = _sigmoid_weighted(acc) * up
    return acc


@triton.jit(do_not_specialize=["num_rows", "first_expert", "E", "J"])
def few_kernel(
    x_ptr, w_ptr, out_ptr, experts_ptr, num_rows, first_expert, E, J, N, K,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BY_PAIR: tl.constexpr,
    EVEN_K: tl.constexpr, EVICT_FIRST: tl.constexpr, SILU_MUL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """At most BLOCK_M rows in all: row t of the step is row t of every expert's tile, so nothing is grouped.

    SILU_MUL reads rows of x by row, else x has a row for each pair; the result has one for each pair. A
    program serves one expert and BLOCK_N outputs: with BY_PAIR the expert of a pair, if no earlier pair
    has it, else one of all experts.
    """
    begin(PDL)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    item = tl.program_id(0) // num_n_tiles
    column = tl.program_id(0) % num_n_tiles * BLOCK_N
    offs_n = column + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, BLOCK_J)
    pairs = rows[:, None] * J + offs_j[None, :]
    keep = (rows < num_rows)[:, None] & (offs_j < J)[None, :]
    experts = tl.load(experts_ptr + pairs, mask=keep, other=-1)
    if BY_PAIR:
        expert = tl.load(experts_ptr + item)
    else:
        expert = first_expert + item
    match = keep & (experts == expert)
    first_pair = tl.min(tl.min(tl.where(match, pairs, BLOCK_M * BLOCK_J), axis=1), axis=0)
    if BY_PAIR:
        is_mine = (first_pair == item) & (expert >= first_expert) & (expert < first_expert + E)
    else:
        is_mine = first_pair < BLOCK_M * BLOCK_J
    if is_mine:
        chose = tl.max(match.to(tl.int32), axis=1) > 0
        pair = tl.sum(tl.where(match, pairs, 0), axis=1)
        row = (expert - first_expert) * (2 * N if SILU_MUL else N)
        y = _multiply(
            x_ptr, rows if SILU_MUL else pair, chose, 0, w_ptr, row, column, N, K, BLOCK_M, BLOCK_N, BLOCK_K,
            True, EVEN_K, EVICT_FIRST, False, False, SILU_MUL,
        )  # fmt: skip
        target = out_ptr + pair.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(target, tl.trans(y).to(out_ptr.dtype.element_ty), mask=chose[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["J"])
def tile_kernel(
    x, w, out_ptr, order_ptr, tile_expert_ptr, tile_rows_ptr, num_tiles_ptr, J, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, EVICT_FIRST: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    SILU_MUL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of `place_kernel`. SILU_MUL reads x by row and writes by place, else reads by place and writes by pair.

    What lies at unused places of a tile is computed along and not stored. X_TMA, W_TMA: the operand is a
    descriptor for the bulk copy engine; x then is read by place.
    """
    begin(PDL)
    num_tiles = tl.load(num_tiles_ptr)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    for index in tl.range(tl.program_id(0), num_tiles * num_n_tiles, tl.num_programs(0)):
        tile, tile_n = _tile_of(index, num_tiles, num_n_tiles, GROUP_M)
        expert = tl.load(tile_expert_ptr + tile)
        used = offs_m < tl.load(tile_rows_ptr + tile)
        places = tile * BLOCK_M + offs_m
        pairs = tl.load(order_ptr + places, mask=used, other=0)
        source = pairs // J if SILU_MUL else places
        target = places if SILU_MUL else pairs
        column = tile_n * BLOCK_N
        offs_n = column + tl.arange(0, BLOCK_N)
        y = _multiply(
            x, source, used, tile * BLOCK_M, w, expert * (2 * N if SILU_MUL else N), column, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K, EVICT_FIRST, X_TMA, W_TMA, SILU_MUL,
        )  # fmt: skip
        if SWAP:
            y = tl.trans(y)
        out = out_ptr + target.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=used[:, None] & (offs_n < N)[None, :])


@triton.jit
def combine_kernel(rows_ptr, weights_ptr, out_ptr, K, J: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """out[t] = Σ weight[t, j] * rows[t, j], j ascending, each step one fused multiply-add from 0."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for j in tl.static_range(J):
        weight = tl.load(weights_ptr + row * J + j)
        y = tl.load(rows_ptr + (row * J + j) * K + offs, mask=offs < K, other=0.0).to(tl.float32)
        total = tl.fma(y, tl.zeros((BLOCK_K,), tl.float32) + weight, total)
    tl.store(out_ptr + row * K + offs, total.to(out_ptr.dtype.element_ty), mask=offs < K)
