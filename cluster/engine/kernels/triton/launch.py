"""Starts the Triton kernels: checks shapes, picks grids, owns no state.

Every function allocates its result with the current allocator and never waits for the device, so a
call can be captured into a CUDA graph. Inputs whose first element is not 16-byte aligned are copied:
alignment decides how a compiler deals elements to threads, and so, in a sum, the order.
"""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import linear, norm, rope, vocab
from cluster.engine.kernels.triton.overlap import overlap
from cluster.engine.kernels.triton.plans import VOCABULARY_CHUNK, LinearPlan
from cluster.engine.kernels.triton.table import unmeasured_plan


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if dense and 16-byte aligned, else a copy that is."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.contiguous().clone()


def _tma_takes(x: torch.Tensor) -> bool:
    """The bulk copy engine wants rows that start at multiples of 16 bytes."""
    return x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def library_takes(w_NK: torch.Tensor) -> bool:
    """Whether cuBLASLt is worth asking: where rows do not start at multiples of 16 bytes, its kernels add in other
    orders (H200: 33 and 130 columns), and admission would refuse it."""
    return _tma_takes(w_NK)


def _hopper_takes(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool,
) -> bool:
    """Whether a kernel of `launch_hopper` computes this product; else any chain does."""
    through_engine = (x_MK, w_NK, out_MN) if plan.kind == "hopper" else (x_MK, w_NK)
    return (
        all(_tma_takes(x) for x in through_engine)
        and x_MK.element_size() == 2
        and (plan.kind == "stream" or bias_N is None or not silu_mul)
    )


def run_linear(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool = False,
    num_programs: int = 1,
    pdl: int = False,
) -> None:
    """out = x Wᵀ (+ bias), or silu(gate) * up with W = [gate; up] of 2N rows. Rows of all operands are dense."""
    if plan.kind in ("stream", "hopper"):
        if _hopper_takes(x_MK, w_NK, bias_N, out_MN, plan, silu_mul=silu_mul):
            from cluster.engine.kernels.triton import launch_hopper

            run = launch_hopper.run_stream if plan.kind == "stream" else launch_hopper.run_hopper
            run(x_MK, w_NK, bias_N, out_MN, plan, silu_mul=silu_mul, num_programs=num_programs, pdl=pdl)
            return
        plan = unmeasured_plan(x_MK.shape[0])
    num_rows, in_features = x_MK.shape
    out_features = out_MN.shape[1]
    tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, plan.block_n)
    bias = bias_N if bias_N is not None else out_MN
    if plan.kind == "tma" and _tma_takes(x_MK) and _tma_takes(w_NK) and _tma_takes(out_MN):
        parts = plan.store_parts * (out_MN.element_size() // x_MK.element_size())
        x_desc = TensorDescriptor.from_tensor(x_MK, [plan.block_m, plan.block_k])
        w_desc = TensorDescriptor.from_tensor(w_NK, [plan.block_n, plan.block_k])
        out_desc = TensorDescriptor.from_tensor(out_MN, [plan.block_m, plan.block_n // parts])
        programs = min(tiles, num_programs) if plan.persistent else tiles
        linear.tma_kernel[(programs,)](
            x_desc, w_desc, out_desc, bias, num_rows, out_features, in_features,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
            GROUP_M=plan.group_m, SWAP=plan.swap, STORE_PARTS=parts, FLATTEN=plan.flatten,
            WARP_SPECIALIZE=plan.warp_specialize, HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul,
            OUT_DTYPE=getattr(triton.language, str(out_MN.dtype).removeprefix("torch.")),
            num_warps=plan.num_warps, num_stages=plan.num_stages, **overlap(pdl),
        )  # fmt: skip
        return
    linear.chain_kernel[(tiles,)](
        x_MK, w_NK, bias, out_MN, num_rows, out_features, in_features,
        x_MK.stride(0), w_NK.stride(0), out_MN.stride(0),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m,
        SWAP=plan.swap, EVEN_K=in_features % plan.block_k == 0, EVICT_FIRST=plan.evict_first,
        HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul, num_warps=plan.num_warps, num_stages=plan.num_stages,
        **overlap(pdl),
    )  # fmt: skip


def run_library_linear(x_TK: torch.Tensor, w_NK: torch.Tensor, out_TN: torch.Tensor) -> None:
    """out = x Wᵀ by cuBLASLt, whose bits depend on the shape."""
    if out_TN.dtype == x_TK.dtype:
        torch.mm(x_TK, w_NK.t(), out=out_TN)
    else:
        torch.mm(x_TK, w_NK.t(), out_dtype=out_TN.dtype, out=out_TN)


def run_rms_norm(
    x_TK: torch.Tensor,
    update_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    pdl: int = False,
) -> torch.Tensor:
    """rms_norm(x), or x += update in place, then rms_norm(x). In place needs x dense and aligned."""
    num_rows, width = x_TK.shape
    if update_TK is None:
        x_TK = aligned(x_TK)
    elif not x_TK.is_contiguous() or x_TK.data_ptr() % 16:
        raise ValueError("the residual must be dense and 16-byte aligned: it is updated in place")
    else:
        update_TK = aligned(update_TK)
    out = torch.empty((num_rows, width), dtype=out_dtype, device=x_TK.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        norm.rms_norm_kernel[(num_rows,)](
            x_TK, x_TK if update_TK is None else update_TK, aligned(weight_K), out, eps,
            K=width, BLOCK_K=block, HAS_UPDATE=update_TK is not None,
            num_warps=max(1, min(16, block // 512)), **overlap(pdl),
        )  # fmt: skip
    return out


def check_qkv(qkv_TC: torch.Tensor, num_heads: int, num_kv_heads: int, head_size: int) -> None:
    """`ValueError` if its columns are not those of so many heads of q, k and v."""
    if qkv_TC.shape[1] != (num_heads + 2 * num_kv_heads) * head_size:
        raise ValueError(
            f"qkv has {qkv_TC.shape[1]} columns, expected ({num_heads} + 2 * {num_kv_heads}) * {head_size}"
        )


def run_rope_and_cache(
    qkv_TC: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    cos_sin_PD: torch.Tensor,
    num_heads: int,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
    *,
    pdl: int = False,
) -> torch.Tensor:
    num_rows = qkv_TC.shape[0]
    _, _, num_kv_heads, block_size, head_size = kv_N2GSD.shape
    check_qkv(qkv_TC, num_heads, num_kv_heads, head_size)
    if (q_norm_D is None) != (k_norm_D is None):
        raise ValueError("q_norm and k_norm are given together or not at all")
    q_out = torch.empty((num_rows, num_heads, head_size), dtype=kv_N2GSD.dtype, device=qkv_TC.device)
    num_pairs = num_rows * (num_heads + 2 * num_kv_heads)
    qkv_TC = aligned(qkv_TC)
    if num_pairs:
        rope.rope_cache_kernel[(triton.cdiv(num_pairs, 16),)](
            qkv_TC, q_out, kv_N2GSD, cos_sin_PD, metadata.positions, metadata.slot_mapping,
            cos_sin_PD if q_norm_D is None else q_norm_D, cos_sin_PD if k_norm_D is None else k_norm_D,
            num_pairs, qkv_TC.stride(0), kv_N2GSD.stride(0), kv_N2GSD.stride(1), kv_N2GSD.stride(2), norm_eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, D=head_size,
            BLOCK_HALF=triton.next_power_of_2(head_size // 2), BLOCK_SIZE=block_size, PAIRS=16,
            HAS_NORM=q_norm_D is not None, num_warps=4, **overlap(pdl),
        )  # fmt: skip
    return q_out


def run_vocab_stats(logits_TV: torch.Tensor, *, pdl: int = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(max, logsumexp) fp32 and (argmax) int64 of each row; ties go to the lower id."""
    num_rows, vocabulary = logits_TV.shape
    logits_TV = aligned(logits_TV)
    device = logits_TV.device
    chunks = triton.cdiv(vocabulary, VOCABULARY_CHUNK)
    maximum = torch.empty(num_rows, dtype=torch.float32, device=device)
    logsumexp = torch.empty_like(maximum)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows:
        chunk_max = torch.empty((num_rows, chunks), dtype=torch.float32, device=device)
        chunk_sum = torch.empty_like(chunk_max)
        chunk_id = torch.empty((num_rows, chunks), dtype=torch.int32, device=device)
        vocab.chunk_stats_kernel[(chunks, num_rows)](
            logits_TV, chunk_max, chunk_sum, chunk_id, logits_TV.stride(0), vocabulary, chunks,
            CHUNK=VOCABULARY_CHUNK, num_warps=4, **overlap(pdl),
        )  # fmt: skip
        vocab.fold_stats_kernel[(num_rows,)](
            chunk_max, chunk_sum, chunk_id, maximum, logsumexp, argmax, chunks, vocabulary,
            BLOCK_CHUNKS=triton.next_power_of_2(chunks), num_warps=1, **overlap(pdl),
        )  # fmt: skip
    return maximum, logsumexp, argmax
