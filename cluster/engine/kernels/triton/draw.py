"""Drawing tokens, and ranking them, for all rows of a step at once: `sampling/draw.py` without waiting.

The same single-rounded fp32 operations in the same order as the reference (`sampling/noise.py`,
`elementary.py`): the kernels are compiled without fused multiply-adds and divide as IEEE 754 says.

Shape legend: R rows, V vocabulary; the vocabulary is cut into chunks counted from id 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cluster.engine.sampling import elementary
from cluster.engine.sampling.noise import LARGEST_BELOW_ONE

CHUNK = 2048
_LN2_HIGH = tl.constexpr(elementary.LN2_HIGH)
_LN2_LOW = tl.constexpr(elementary.LN2_LOW)
_SQRT_HALF_MANTISSA = tl.constexpr(elementary.SQRT_HALF_MANTISSA)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = (tl.constexpr(c) for c in elementary.LOG_COEFFICIENTS)
_W_MAX = tl.constexpr(LARGEST_BELOW_ONE)
_UNIT = tl.constexpr(2.0**-32)


@triton.jit
def _log(x):
    """`elementary.log`."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    is_upper = (mantissa > _SQRT_HALF_MANTISSA).to(tl.int32)
    exponent = ((bits >> 23) - 127 + is_upper).to(tl.float32)
    f = (mantissa | ((127 - is_upper) << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    y = f * _C0
    y = (y + _C1) * f
    y = (y + _C2) * f
    y = (y + _C3) * f
    y = (y + _C4) * f
    y = (y + _C5) * f
    y = (y + _C6) * f
    y = (y + _C7) * f
    y = y + _C8
    y = y * f * square
    y = y + exponent * _LN2_LOW
    y = y - square * 0.5
    y = y + f
    return y + exponent * _LN2_HIGH


@triton.jit
def _gumbel(random_bits):
    """`noise.gumbel`."""
    w = tl.minimum((random_bits.to(tl.float32) + 0.5) * _UNIT, _W_MAX)
    u = 1.0 - w
    rest = 1.0 - u
    exponential = tl.math.div_rn(-_log(u) * w, tl.where(rest == 0.0, 1.0, rest))
    exponential = tl.where(rest == 0.0, w, exponential)
    return -_log(exponential)


@triton.jit
def _noise(first_id, seed, position, CHUNK: tl.constexpr):
    """(CHUNK,) noise of the ids from `first_id` on, a multiple of 4: one evaluation for four of them."""
    groups = (first_id // 4 + tl.arange(0, CHUNK // 4)).to(tl.uint32)
    zero = groups * 0
    a, b, c, d = tl.philox(seed, groups, zero + position.to(tl.uint32), zero, zero)
    lanes = tl.join(tl.join(a, b), tl.join(c, d))  # [group, low bit, high bit] of the lane
    return _gumbel(tl.reshape(tl.permute(lanes, (0, 2, 1)), (CHUNK,)))


@triton.jit
def draw_chunk_kernel(
    logits_ptr, top_ptr, row_ptr, number_ptr, seed_ptr, position_ptr, score_ptr, id_ptr, stride_row, V, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Best score and its id of one chunk of one drawn row. number_ptr: (inverse temperature, lowest value)."""
    index = tl.program_id(1)
    chunk = tl.program_id(0)
    row = tl.load(row_ptr + index)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride_row + offs, mask=offs < V, other=float("-inf"))
    scaled = (logits - tl.load(top_ptr + row)) * tl.load(number_ptr + 2 * index)
    scores = scaled + _noise(chunk * CHUNK, tl.load(seed_ptr + index), tl.load(position_ptr + index), CHUNK)
    keep = (scaled >= tl.load(number_ptr + 2 * index + 1)) & (offs < V)
    scores = tl.where(keep, scores, float("-inf"))
    best = tl.max(scores, axis=0)
    place = index.to(tl.int64) * num_chunks + chunk
    tl.store(score_ptr + place, best)
    tl.store(id_ptr + place, tl.min(tl.where(scores == best, offs, V - 1), axis=0))


@triton.jit
def draw_fold_kernel(score_ptr, id_ptr, row_ptr, token_ptr, num_chunks, V, BLOCK_CHUNKS: tl.constexpr):
    index = tl.program_id(0)
    offs = tl.arange(0, BLOCK_CHUNKS)
    place = index.to(tl.int64) * num_chunks + offs
    scores = tl.load(score_ptr + place, mask=offs < num_chunks, other=float("-inf"))
    ids = tl.load(id_ptr + place, mask=offs < num_chunks, other=2147483647)
    best = tl.max(scores, axis=0)
    token = tl.min(tl.where(scores == best, ids, V - 1), axis=0)
    tl.store(token_ptr + tl.load(row_ptr + index), token.to(tl.int64))


@triton.jit
def rank_kernel(logits_ptr, token_ptr, rank_ptr, stride_row, V, CHUNK: tl.constexpr):
    """Counts what is more likely than the token: larger, or equal with a lower id. Integers have no order of sum."""
    row = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    token = tl.load(token_ptr + row)
    chosen = tl.load(logits_ptr + row * stride_row + token)
    logits = tl.load(logits_ptr + row * stride_row + offs, mask=offs < V, other=float("-inf"))
    before = (logits > chosen) | ((logits == chosen) & (offs < token))
    tl.atomic_add(rank_ptr + row, tl.sum((before & (offs < V)).to(tl.int32), axis=0))


def draw_tokens(
    logits_RV: torch.Tensor,
    top_R: torch.Tensor,
    rows_D: torch.Tensor,
    numbers_D2: torch.Tensor,
    seeds_D: torch.Tensor,
    positions_D: torch.Tensor,
    tokens_R: torch.Tensor,
) -> None:
    """Draw the rows `rows_D` (int32) into `tokens_R` (int64), in place.

    `top_R` each row's finite maximum, `numbers_D2` fp32 (inverse temperature, lowest scaled value that may
    be drawn), `seeds_D` int64, `positions_D` int32.
    """
    count, vocabulary = len(rows_D), logits_RV.shape[1]
    chunks = triton.cdiv(vocabulary, CHUNK)
    scores = torch.empty((count, chunks), dtype=torch.float32, device=logits_RV.device)
    ids = torch.empty((count, chunks), dtype=torch.int32, device=logits_RV.device)
    draw_chunk_kernel[(chunks, count)](
        logits_RV, top_R, rows_D, numbers_D2, seeds_D, positions_D, scores, ids, logits_RV.stride(0), vocabulary,
        chunks, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    draw_fold_kernel[(count,)](
        scores, ids, rows_D, tokens_R, chunks, vocabulary, BLOCK_CHUNKS=triton.next_power_of_2(chunks), num_warps=1
    )


def ranks(logits_RV: torch.Tensor, tokens_R: torch.Tensor) -> torch.Tensor:
    """(R,) int32: 1 for the most likely token."""
    counts = torch.ones(len(logits_RV), dtype=torch.int32, device=logits_RV.device)
    rank_kernel[(triton.cdiv(logits_RV.shape[1], 4096), len(logits_RV))](
        logits_RV, tokens_R, counts, logits_RV.stride(0), logits_RV.shape[1], CHUNK=4096, num_warps=4
    )
    return counts
