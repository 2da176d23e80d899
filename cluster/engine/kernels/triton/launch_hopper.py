"""Starts the two GEMM kernels written for Hopper in Gluon. Nothing here is imported before a plan asks for it."""

from __future__ import annotations

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cluster.engine.kernels.triton import linear_hopper, linear_stream
from cluster.engine.kernels.triton.gluon_names import shared_layout
from cluster.engine.kernels.triton.plans import LinearPlan


def _boxes(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`x` cut into boxes for the copy engine, in the layout the tensor core reads."""
    layout = shared_layout(min(128, columns * x.element_size()), x.element_size() * 8)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def _options(pdl: int) -> dict[str, bool]:
    """`pdl` as in `overlap.py`; these kernels have an order of their own."""
    return {"PDL": bool(pdl), "launch_pdl": bool(pdl)}


def run_stream(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool,
    num_programs: int,
    pdl: int,
) -> None:
    """As `launch.run_linear`; x and W have rows the copy engine takes."""
    num_rows, in_features = x_MK.shape
    out_features = out_MN.shape[1]
    tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, plan.block_n)
    programs = min(tiles, num_programs * plan.programs_per_multiprocessor) if plan.persistent else tiles
    block_n = 1 << (plan.block_n.bit_length() - 1)
    tail_n = plan.block_n - block_n
    w_boxes = _boxes(w_NK, block_n, plan.block_k)
    linear_stream.stream_kernel[(programs,)](
        _boxes(x_MK, plan.block_m, plan.block_k), w_boxes,
        _boxes(w_NK, tail_n, plan.block_k) if tail_n else w_boxes,
        out_MN if bias_N is None else bias_N, out_MN, num_rows, out_features, in_features, out_MN.stride(0),
        BLOCK_M=plan.block_m, BLOCK_N=block_n, TAIL_N=tail_n, BLOCK_K=plan.block_k, STAGES=plan.num_stages,
        SWAP=plan.swap, WARPGROUP=plan.swap or plan.block_m >= 64, ONE_ROW_TILE=num_rows <= plan.block_m,
        HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul, LAUNCH_FIRST=plan.launch_first,
        num_warps=plan.num_warps, **_options(pdl),
    )  # fmt: skip


def run_hopper(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool,
    num_programs: int,
    pdl: int,
) -> None:
    """As `launch.run_linear`; all three matrices have rows the copy engine takes, and SwiGLU has no bias."""
    num_rows, in_features = x_MK.shape
    out_features = out_MN.shape[1]
    columns = plan.block_n // 2 if silu_mul else plan.block_n
    part = columns // (plan.store_parts * (out_MN.element_size() // 2))
    tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, columns)
    consumers = 3 if plan.block_m == 192 else 2  # of 64 or 128 rows each: powers of two
    rows = plan.block_m // consumers
    linear_hopper.hopper_kernel[(min(tiles, num_programs),)](
        _boxes(x_MK, rows, plan.block_k), _boxes(w_NK, plan.block_n // 2, plan.block_k), _boxes(out_MN, rows, part),
        out_MN if bias_N is None else bias_N, num_rows, out_features, in_features,
        CONSUMERS=consumers, STAGES=plan.num_stages, GROUP_M=plan.group_m,
        HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul, num_warps=4, **_options(pdl),
    )  # fmt: skip
