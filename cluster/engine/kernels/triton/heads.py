"""A GEMM per attention head: (T, H, K) x (H, N, K) -> (T, H, N), each with the bits of `linear.chain_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.linear import chain_kernel


@triton.jit(do_not_specialize=["M"])
def head_chain_kernel(
    x_ptr, w_ptr, out_ptr, M, N, K, stride_x, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, EVICT_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The chain of head `program_id(1)`, whose rows lie K (of x) and N (of the result) apart from the next head's."""
    head = tl.program_id(1).to(tl.int64)
    out_ptr += head * N
    chain_kernel(
        x_ptr + head * K, w_ptr + head * N * K, out_ptr, out_ptr, M, N, K, stride_x, K, stride_out,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP, EVEN_K, EVICT_FIRST, False, False, PDL,
    )  # fmt: skip
