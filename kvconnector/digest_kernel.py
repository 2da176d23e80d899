"""`digest.py` on the device: the digests of many parts of blocks in one launch, on a stream of their own.

The sums are integers modulo 2**64, so neither tiles nor the order of atomic additions can change them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _mix(x, M1: tl.constexpr, M2: tl.constexpr):
    x = x ^ (x >> 30)
    x = x * M1
    x = x ^ (x >> 27)
    x = x * M2
    return x ^ (x >> 31)


@triton.jit
def digest_kernel(
    words_ptr, key_ptr, span_ptr, total_ptr, stride_block, first_place, first_head, NUM_HEADS: tl.constexpr,
    NUM_TOKENS: tl.constexpr, NUM_WORDS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """One program per (span, layer and plane, head). A span: block, absolute position of its token 0, start, end."""
    span = tl.program_id(0)
    place = tl.program_id(1)
    head = tl.program_id(2)
    block = tl.load(span_ptr + span * 4)
    first_position = tl.load(span_ptr + span * 4 + 1)
    token = tl.arange(0, BLOCK_TOKENS)
    word = tl.arange(0, BLOCK_WORDS)
    in_span = (token >= tl.load(span_ptr + span * 4 + 2)) & (token < tl.load(span_ptr + span * 4 + 3))
    row = (place * NUM_HEADS + head) * NUM_TOKENS + token
    offsets = block * stride_block + row[:, None] * NUM_WORDS + word[None, :]
    keep = in_span[:, None] & (word < NUM_WORDS)[None, :]
    words = tl.load(words_ptr + offsets, mask=keep, other=0).to(tl.uint64, bitcast=True)
    key = tl.load(key_ptr + word, mask=word < NUM_WORDS, other=0).to(tl.uint64, bitcast=True)
    products = (words ^ (words >> 32)) * key[None, :]
    sums = tl.sum(products.to(tl.int64, bitcast=True), axis=1).to(tl.uint64, bitcast=True)
    position = (first_position + token).to(tl.uint64)
    sums = sums + position * A
    sums = sums + (first_place + place).to(tl.uint64) * B + (first_head + head).to(tl.uint64) * C
    mixed = _mix(sums, M1, M2).to(tl.int64, bitcast=True)
    tl.atomic_add(total_ptr + span * NUM_HEADS + head, tl.sum(tl.where(in_span, mixed, 0), axis=0))


def start_digests(
    words_NL2HSW: torch.Tensor,
    key_W: torch.Tensor,
    spans_N4: torch.Tensor,
    *,
    first_layer: int,
    first_kv_head: int,
    constants: dict[str, int],
) -> torch.Tensor:
    """(N, H) int64 on the device, queued on the current stream. All operands are int64; `constants` are the
    names of the formula (A, B, C, M1, M2)."""
    _, layers, planes, heads, tokens, words = words_NL2HSW.shape
    totals = torch.zeros((len(spans_N4), heads), dtype=torch.int64, device=words_NL2HSW.device)
    digest_kernel[(len(spans_N4), layers * planes, heads)](
        words_NL2HSW, key_W, spans_N4, totals, words_NL2HSW.stride(0), planes * first_layer, first_kv_head,
        NUM_HEADS=heads, NUM_TOKENS=tokens, NUM_WORDS=words, BLOCK_TOKENS=triton.next_power_of_2(tokens),
        BLOCK_WORDS=triton.next_power_of_2(words), num_warps=4, **constants,
    )  # fmt: skip
    return totals
