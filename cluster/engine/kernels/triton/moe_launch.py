"""Starts the kernels of `moe.py`: sizes scratch for the worst case, picks grids, owns no state.

Shapes alone decide everything on the host, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cluster.engine.kernels.ops import GroupedRouting
from cluster.engine.kernels.triton import moe, route_grouped
from cluster.engine.kernels.triton.launch import _tma_takes, aligned
from cluster.engine.kernels.triton.moe_plans import GroupedPlan, MoePlan
from cluster.engine.kernels.triton.overlap import overlap


def _rows_of_chunk(block_e: int) -> int:
    """Rows whose places one program finds: its table of rows and experts has to stay in registers."""
    return min(64, max(16, 8192 // block_e))


def run_route(
    logits_TE: torch.Tensor, top_k: int, *, renormalise: bool, pdl: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, J) experts int32, ascending, and their weights fp32."""
    num_rows, num_experts = logits_TE.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"{top_k} of {num_experts} experts cannot be chosen")
    experts = torch.empty((num_rows, top_k), dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=logits_TE.device)
    if num_rows:
        rows = 1 if num_rows <= 1024 else 4
        moe.route_kernel[(triton.cdiv(num_rows, rows),)](
            logits_TE, experts, weights, num_rows, logits_TE.stride(0), E=num_experts, J=top_k, BLOCK_T=rows,
            BLOCK_E=triton.next_power_of_2(num_experts), RENORMALISE=renormalise, num_warps=rows, **overlap(pdl),
        )  # fmt: skip
    return experts, weights


def run_route_grouped(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: GroupedRouting, *, pdl: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, J) experts int32, ascending, and their weights fp32."""
    num_rows, num_experts = logits_TE.shape
    group_size = num_experts // routing.num_groups
    if not 0 < routing.top_k <= routing.top_groups * group_size:
        raise ValueError(f"{routing.top_k} experts cannot be chosen of {routing.top_groups} groups of {group_size}")
    experts = torch.empty((num_rows, routing.top_k), dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty((num_rows, routing.top_k), dtype=torch.float32, device=logits_TE.device)
    if num_rows:
        route_grouped.route_grouped_kernel[(num_rows,)](
            logits_TE, logits_TE if bias_E is None else bias_E, experts, weights, logits_TE.stride(0), routing.scale,
            G=routing.num_groups, BLOCK_G=triton.next_power_of_2(routing.num_groups), M=group_size,
            BLOCK_M=triton.next_power_of_2(group_size), J=routing.top_k, TOP_GROUPS=routing.top_groups,
            SIGMOID=routing.scoring == "sigmoid", HAS_BIAS=bias_E is not None, RENORMALISE=routing.renormalise,
            num_warps=1, **overlap(pdl),
        )  # fmt: skip
    return experts, weights


@dataclass(frozen=True, slots=True)
class Grouping:
    """Pairs by expert, as `place_kernel` leaves them; `max_tiles` bounds the number of tiles."""

    order: torch.Tensor
    tile_expert: torch.Tensor
    tile_rows: torch.Tensor
    num_tiles: torch.Tensor  # (1,)
    max_tiles: int


def run_grouping(
    experts_TJ: torch.Tensor, num_experts: int, first_expert: int, block_m: int, *, pdl: int = 0
) -> Grouping:
    """The pairs of experts first_expert : first_expert + num_experts in tiles of `block_m` places."""
    num_rows, top_k = experts_TJ.shape
    device = experts_TJ.device
    num_pairs = num_rows * top_k
    max_tiles = (num_pairs + min(num_pairs, num_experts) * (block_m - 1)) // block_m
    block_e = triton.next_power_of_2(num_experts)
    rows = _rows_of_chunk(block_e)
    chunks = triton.cdiv(num_rows, rows)
    counts = torch.empty((chunks, block_e), dtype=torch.int32, device=device)
    grouping = Grouping(
        order=torch.empty(max_tiles * block_m, dtype=torch.int32, device=device),
        tile_expert=torch.empty(max_tiles, dtype=torch.int32, device=device),
        tile_rows=torch.empty(max_tiles, dtype=torch.int32, device=device),
        num_tiles=torch.empty(1, dtype=torch.int32, device=device),
        max_tiles=max_tiles,
    )
    constants = {"E": num_experts, "J": top_k, "BLOCK_T": rows, "BLOCK_E": block_e, "num_warps": 16}
    moe.count_kernel[(chunks,)](experts_TJ, counts, num_rows, first_expert, **constants, **overlap(pdl))
    moe.place_kernel[(chunks,)](
        experts_TJ, counts, grouping.order, grouping.tile_expert, grouping.tile_rows, grouping.num_tiles,
        num_rows, chunks, first_expert, **constants, BLOCK_M=block_m, BLOCK_C=32, **overlap(pdl),
    )  # fmt: skip
    return grouping


def run_experts(
    x_TK: torch.Tensor,
    experts_TJ: torch.Tensor,
    gate_up_ENK: torch.Tensor,
    down_EKF: torch.Tensor,
    plan: MoePlan,
    *,
    first_expert: int = 0,
    num_programs: int = 1,
    out_dtype: torch.dtype | None = None,
    pdl: int = 0,
) -> torch.Tensor:
    """(T, J, K) in x's type or the one given; pairs of experts that the weights do not hold stay unwritten."""
    num_rows, top_k = experts_TJ.shape
    num_experts, hidden, features = down_EKF.shape
    rows_TJK = torch.empty((num_rows, top_k, hidden), dtype=out_dtype or x_TK.dtype, device=x_TK.device)
    if num_rows == 0:
        return rows_TJK
    if plan.kind == "few" and num_rows > plan.block_m:
        raise ValueError(f"a plan for at most {plan.block_m} rows cannot serve {num_rows}")
    x_TK, experts_TJ = aligned(x_TK), aligned(experts_TJ)
    rows_PK = rows_TJK.view(-1, hidden)
    if plan.kind == "few":
        active_PF = torch.empty((num_rows * top_k, features), dtype=x_TK.dtype, device=x_TK.device)
        few = FewCall(experts_TJ, first_expert, plan.block_m, pdl)
        few.run(x_TK, gate_up_ENK, active_PF, plan.gate_up, silu_mul=True)
        few.run(active_PF, down_EKF, rows_PK, plan.down, silu_mul=False)
        return rows_TJK
    grouping = run_grouping(experts_TJ, num_experts, first_expert, plan.block_m, pdl=pdl)
    active = torch.empty((len(grouping.order), features), dtype=x_TK.dtype, device=x_TK.device)
    grouped = GroupedCall(grouping, top_k, plan.block_m, num_programs, pdl)
    grouped.run(x_TK, gate_up_ENK, active, plan.gate_up, silu_mul=True)
    grouped.run(active, down_EKF, rows_PK, plan.down, silu_mul=False)
    return rows_TJK


@dataclass(frozen=True, slots=True)
class FewCall:
    """The GEMMs of a step of at most `block_m` rows."""

    experts_TJ: torch.Tensor
    first_expert: int
    block_m: int
    pdl: int

    def run(
        self, x: torch.Tensor, w_ENK: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, *, silu_mul: bool
    ) -> None:
        """`silu_mul`: x has the rows of the step, else a row per pair; out has one per pair."""
        num_rows, top_k = self.experts_TJ.shape
        num_experts, _, in_features = w_ENK.shape
        by_pair = num_rows * top_k < num_experts
        items = num_rows * top_k if by_pair else num_experts
        moe.few_kernel[(items * triton.cdiv(out.shape[1], plan.block_n),)](
            x, w_ENK, out, self.experts_TJ, num_rows, self.first_expert, num_experts, top_k, out.shape[1],
            in_features, BLOCK_J=max(8, triton.next_power_of_2(top_k)), BLOCK_M=self.block_m, BLOCK_N=plan.block_n,
            BLOCK_K=plan.block_k, BY_PAIR=by_pair, EVEN_K=in_features % plan.block_k == 0,
            EVICT_FIRST=plan.evict_first, SILU_MUL=silu_mul, num_warps=plan.num_warps, num_stages=plan.num_stages,
            **overlap(self.pdl),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupedCall:
    """The GEMMs of a step whose pairs are grouped."""

    grouping: Grouping
    top_k: int
    block_m: int
    num_programs: int
    pdl: int

    def run(
        self, x: torch.Tensor, w_ENK: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, *, silu_mul: bool
    ) -> None:
        """`silu_mul`: x has the rows of the step and out a row per place, else x one per place and out one per pair."""
        grouping, in_features = self.grouping, w_ENK.shape[2]
        tiles = grouping.max_tiles * triton.cdiv(out.shape[1], plan.block_n)
        w_rows: object = w_ENK
        x_rows: object = x
        w_tma = plan.tma and _tma_takes(w_ENK[0])
        x_tma = w_tma and not silu_mul and _tma_takes(x)
        if w_tma:
            w_rows = TensorDescriptor.from_tensor(w_ENK.flatten(0, 1), [plan.block_n, plan.block_k])
        if x_tma:
            x_rows = TensorDescriptor.from_tensor(x, [self.block_m, plan.block_k])
        moe.tile_kernel[(min(tiles, self.num_programs) if plan.persistent else tiles,)](
            x_rows, w_rows, out, grouping.order, grouping.tile_expert, grouping.tile_rows, grouping.num_tiles,
            self.top_k, out.shape[1], in_features, BLOCK_M=self.block_m, BLOCK_N=plan.block_n,
            BLOCK_K=plan.block_k, GROUP_M=plan.group_m, SWAP=plan.swap, EVEN_K=in_features % plan.block_k == 0,
            EVICT_FIRST=plan.evict_first, X_TMA=x_tma, W_TMA=w_tma, SILU_MUL=silu_mul,
            num_warps=plan.num_warps, num_stages=plan.num_stages, **overlap(self.pdl),
        )  # fmt: skip


def run_combine(
    rows_TJK: torch.Tensor, weights_TJ: torch.Tensor, out_dtype: torch.dtype, *, pdl: int = 0
) -> torch.Tensor:
    """(T, K): the weighted sum over j ascending."""
    num_rows, top_k, width = rows_TJK.shape
    out = torch.empty((num_rows, width), dtype=out_dtype, device=rows_TJK.device)
    if num_rows:
        block = min(1024, triton.next_power_of_2(width))
        moe.combine_kernel[(num_rows, triton.cdiv(width, block))](
            aligned(rows_TJK), aligned(weights_TJ), out, width, J=top_k, BLOCK_K=block,
            num_warps=max(1, block // 256), **overlap(pdl),
        )  # fmt: skip
    return out
