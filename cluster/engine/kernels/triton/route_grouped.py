"""DeepSeek's choice of experts: scores, the best groups, the best experts of these (`Ops.moe_route_grouped`).

Shape legend: T rows, E experts, G groups of M = E / G experts, J experts of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def _exact_sum(p):
    """(G, M) -> scalar: numbers from 0 to 1 in whole steps of 2^-40. Integers have no order of addition."""
    steps = tl.sum(tl.sum((p * 1099511627776.0).to(tl.int64), axis=1), axis=0)
    return steps.to(tl.float32) * (1.0 / 1099511627776.0)


@triton.jit
def _divide(p, divisor):
    return tl.math.div_rn(p, tl.zeros(p.shape, tl.float32) + divisor)


@triton.jit
def _ordered(x, index):
    """Integers from 0 to 2^44 in the order of x (no NaN), of equal ones the lower index first; it is below 4096."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return ascending * 4096 + (4095 - index)


@triton.jit
def route_grouped_kernel(
    logits_ptr, bias_ptr, experts_ptr, weights_ptr, stride_logits, scale,
    G: tl.constexpr, BLOCK_G: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, J: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row per program: a tile of groups by experts. The chosen are stored in the order of the index."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_M)
    expert = group[:, None] * M + member[None, :]
    keep = (group < G)[:, None] & (member < M)[None, :]
    logits = tl.load(logits_ptr + row * stride_logits + expert, mask=keep, other=float("-inf"))
    if SIGMOID:
        scores = tl.math.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        e = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        is_bad = tl.max(tl.max((e != e).to(tl.int32), axis=1), axis=0) > 0
        divisor = _exact_sum(tl.where(is_bad, 0.0, e))
        scores = tl.where(is_bad, float("nan"), _divide(e, tl.where(is_bad, 1.0, divisor)))
    ranking = scores
    if HAS_BIAS:
        ranking = scores + tl.load(bias_ptr + expert, mask=keep, other=0.0)
    broken = tl.max(tl.max(((ranking != ranking) & keep).to(tl.int32), axis=1), axis=0) > 0
    scores = tl.where(broken, 0.0, scores)
    ranking = tl.where(broken, 0.0, ranking)

    key = tl.where(keep, _ordered(ranking, expert), -2)
    if TOP_GROUPS < G:
        best = tl.max(key, axis=1)
        is_best = key == best[:, None]
        value = tl.max(tl.where(keep, ranking, float("-inf")), axis=1)
        if SIGMOID and M > 1:
            value += tl.max(tl.where(keep & (is_best == 0), ranking, float("-inf")), axis=1)
        group_key = tl.where(group < G, _ordered(tl.where(group < G, value, 0.0), group), -2)
        for _ in tl.static_range(TOP_GROUPS):
            group_key = tl.where(group_key == tl.max(group_key, axis=0), -1, group_key)
        key = tl.where((group_key == -1)[:, None], key, -2)
    for _ in tl.static_range(J):
        key = tl.where(key == tl.max(tl.max(key, axis=1), axis=0), -1, key)
    chosen = key == -1

    weights = scores
    if RENORMALISE:
        total = tl.maximum(_exact_sum(tl.where(chosen, scores, 0.0)), 1.0 / 1099511627776.0)
        weights = _divide(scores, total)
    weights = tl.where(broken, float("nan"), weights * scale)
    ones = chosen.to(tl.int32)
    in_group = tl.sum(ones, axis=1)
    before = tl.cumsum(in_group, axis=0) - in_group
    place = row * J + before[:, None] + tl.cumsum(ones, axis=1) - 1
    tl.store(experts_ptr + place, expert, mask=chosen)
    tl.store(weights_ptr + place, weights, mask=chosen)
