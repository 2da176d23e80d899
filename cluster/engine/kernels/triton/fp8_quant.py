"""Quantisation of activations to rows of e4m3 values with their scales, alone and where they are made.

The formula is `kernels/fp8.py`'s, the layout of a row too. Whatever is quantised was rounded to bf16
before, as it would have been stored, so that a fused kernel gives the bits of two kernels. The maximum of
a row is taken over integers, which no order of comparing can change.

Shape legend: K input features, P = K filled up to a multiple of 128, one program per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.fp8_linear import silu_mul


@triton.jit
def _scale_of(amax_bits):
    """(scale, its inverse, whether the values are finite) from the largest magnitude, as an fp32's bits."""
    is_finite = amax_bits < 0x7F800000
    amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)  # 2^-100
    amax = tl.where(is_finite, amax, 1.0)
    scale = tl.where(is_finite, tl.math.div_rn(amax, 448.0), float("nan"))
    return scale, tl.math.div_rn(448.0, amax), is_finite


@triton.jit
def _store_quantized(row_ptr, x, P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SCALED: tl.constexpr):
    """One row of fp32 values that bf16 holds, zero from K on, at `row_ptr` (float8): P values, then scales.

    Stores of more than 8 values at once would deal 16 elements to a thread in the whole kernel, and so change
    the order of the sum in the norm before it. Hence the hint; a unit test compares the layouts.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale_ptr = (row_ptr + P).to(tl.pointer_type(tl.float32))
    offs = tl.max_contiguous(tl.arange(0, BLOCK_K), 8)
    if BLOCK_SCALED:
        NUM_GROUPS: tl.constexpr = BLOCK_K // 128
        amax = tl.max(tl.reshape(magnitude, (NUM_GROUPS, 128)), axis=1)
        scale, inverse, is_finite = _scale_of(amax)
        groups = tl.arange(0, NUM_GROUPS)
        tl.store(scale_ptr + groups, scale, mask=groups < P // 128)
        wide = tl.reshape(x, (NUM_GROUPS, 128))
        values = tl.reshape(tl.where(is_finite[:, None], wide * inverse[:, None], 0.0), (BLOCK_K,))
    else:
        scale, inverse, is_finite = _scale_of(tl.max(magnitude, axis=0))
        tl.store(scale_ptr, scale)
        values = tl.where(is_finite, x * inverse, 0.0)
    tl.store(row_ptr + offs, values.to(tl.float8e4nv), mask=offs < P)


@triton.jit
def quantize_kernel(
    x_ptr, out_ptr, stride_x, stride_out, K: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
):  # fmt: skip
    """Rows of bf16."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < K, other=0.0).to(tl.float32)
    _store_quantized(out_ptr + row * stride_out, x, P, BLOCK_K, BLOCK_SCALED)


@triton.jit
def silu_mul_quantize_kernel(
    gate_up_ptr, out_ptr, stride_x, stride_out, K: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of bf16 rows [gate; up] of 2K, rounded to bf16, quantised."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    gate = tl.load(gate_up_ptr + row * stride_x + offs, mask=offs < K, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_x + K + offs, mask=offs < K, other=0.0).to(tl.float32)
    y = silu_mul(gate, up).to(tl.bfloat16).to(tl.float32)
    _store_quantized(out_ptr + row * stride_out, y, P, BLOCK_K, BLOCK_SCALED)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, update_ptr, weight_ptr, out_ptr, eps, stride_out, K: tl.constexpr, P: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_UPDATE: tl.constexpr, BLOCK_SCALED: tl.constexpr,
):  # fmt: skip
    """`norm.rms_norm_kernel` with its bf16 result quantised; every line before that is the same there."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    keep = offs < K
    x = tl.load(x_ptr + row * K + offs, mask=keep, other=0.0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + row * K + offs, mask=keep, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * K + offs, x, mask=keep)
    x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) * (1.0 / K)
    weight = tl.load(weight_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    y = x * tl.math.div_rn(1.0, tl.math.sqrt_rn(mean_square + eps)) * weight
    _store_quantized(out_ptr + row * stride_out, y.to(tl.bfloat16).to(tl.float32), P, BLOCK_K, BLOCK_SCALED)
