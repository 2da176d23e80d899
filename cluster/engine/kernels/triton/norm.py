"""RMSNorm, one program per row, with or without a residual update before it.

The order of the sum follows from the block width, the number of warps and the element type, none of
which depends on the batch, and from 16-byte alignment, which the launcher enforces: an unaligned
pointer would change how elements are dealt to threads, and with it the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def rms_norm_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    out_ptr,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = x / sqrt(mean(x²) + eps) * weight. HAS_UPDATE: x += update first, stored back in x's dtype.

    The norm reads the residual as it was rounded to x's dtype, never the sum before rounding.
    """
    begin(PDL)
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
    tl.store(out_ptr + row * K + offs, y.to(out_ptr.dtype.element_ty), mask=keep)
