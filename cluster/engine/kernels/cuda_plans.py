"""Which admitted plan serves a call of `CudaOps`: how its operations are tried."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.engine.kernels.ops import AttentionMetadata, Rotation
from cluster.engine.kernels.plan_admission import Plan, PlanAdmission
from cluster.engine.kernels.triton import attention_launch, latent_launch
from cluster.engine.kernels.triton.attention_trials import AttentionCase, AttentionTrial, RopeAttentionTrial
from cluster.engine.kernels.triton.latent_trials import HeadTrial, LatentTrial
from cluster.engine.kernels.triton.moe_plans import MoePlan, MoeShape
from cluster.engine.kernels.triton.plans import AttentionPlan, LatentPlan, LinearPlan
from cluster.engine.kernels.triton.trials import ExpertsTrial, LinearTrial


def linear_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, torch.Tensor, LinearPlan], None],
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    num_rows: int,
    out_dtype: torch.dtype,
    plan: LinearPlan,
    *,
    silu_mul: bool,
) -> LinearPlan:
    """`run`: x and a result to be filled, by a plan."""
    call = ("linear", weight_NK.shape, weight_NK.dtype, bias_N is None, num_rows, out_dtype, silu_mul, plan)
    return admission.serving(
        call, plan, lambda: LinearTrial(run, weight_NK, bias_N, num_rows, out_dtype, silu_mul)
    )  # fmt: skip


def attention_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, AttentionPlan], torch.Tensor],
    q_THD: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    window: int | None,
    plan: AttentionPlan,
) -> AttentionPlan:
    """Each of the paths that sequences of this step take is admitted by itself."""
    num_heads, num_sequences = q_THD.shape[1], metadata.context_len.shape[0]
    _, _, num_kv_heads, block_size, head_size = kv_N2GSD.shape
    cache_shape = (num_kv_heads, block_size, head_size)

    def admitted(plan: AttentionPlan, split_rows: int) -> AttentionPlan:
        call = ("attention", num_heads, cache_shape, q_THD.dtype, window, num_sequences, split_rows, plan)
        return admission.serving(
            call, plan,
            lambda: AttentionTrial(
                run, plan,
                AttentionCase(num_heads, cache_shape, q_THD.dtype, window, split_rows, num_sequences, q_THD.device),
            ),
        )  # fmt: skip

    group = num_heads // num_kv_heads
    return _on_each_path(plan, lambda plan: attention_launch.paths(plan, metadata, group), admitted)


def rope_attention_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, Rotation, AttentionPlan], torch.Tensor],
    qkv_TC: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    rotation: Rotation,
    window: int | None,
    plan: AttentionPlan,
) -> AttentionPlan:
    """`plan`, or one that does not rotate: the rotary kernel and the attention's own plan serve then."""
    num_sequences = metadata.context_len.shape[0]
    _, _, num_kv_heads, block_size, head_size = kv_N2GSD.shape
    cache_shape = (num_kv_heads, block_size, head_size)
    call = (
        "rope attention",
        rotation.num_heads,
        cache_shape,
        qkv_TC.dtype,
        kv_N2GSD.dtype,
        window,
        num_sequences,
        plan,
    )
    return admission.serving(
        call, plan,
        lambda: RopeAttentionTrial(
            run, plan,
            AttentionCase(rotation.num_heads, cache_shape, kv_N2GSD.dtype, window, 1, num_sequences, qkv_TC.device),
            qkv_TC.dtype,
        ),
    )  # fmt: skip


def latent_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata, LatentPlan], torch.Tensor],
    q_THL: torch.Tensor,
    kv_N11SD: torch.Tensor,
    metadata: AttentionMetadata,
    plan: LatentPlan,
) -> LatentPlan:
    """As `attention_plan`."""
    (_, num_heads, latent_size), num_sequences = q_THL.shape, metadata.context_len.shape[0]
    cache_shape = (1, kv_N11SD.shape[3], kv_N11SD.shape[4])

    def admitted(plan: LatentPlan, split_rows: int) -> LatentPlan:
        call = ("latent", num_heads, latent_size, cache_shape, q_THL.dtype, num_sequences, split_rows, plan)
        return admission.serving(
            call, plan,
            lambda: LatentTrial(
                run, plan,
                AttentionCase(num_heads, cache_shape, q_THL.dtype, None, split_rows, num_sequences, q_THL.device),
                latent_size,
            ),
        )  # fmt: skip

    return _on_each_path(plan, lambda plan: latent_launch.paths(plan, metadata, num_heads), admitted)


def head_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, LinearPlan], torch.Tensor],
    weight_HNK: torch.Tensor,
    num_rows: int,
    plan: LinearPlan,
) -> LinearPlan:
    call = ("heads", weight_HNK.shape, weight_HNK.dtype, num_rows, plan)
    return admission.serving(call, plan, lambda: HeadTrial(run, weight_HNK, num_rows))


def experts_plan(
    admission: PlanAdmission,
    run: Callable[[torch.Tensor, torch.Tensor, MoePlan], torch.Tensor],
    x_TK: torch.Tensor,
    shape: MoeShape,
    first_expert: int,
    plan: MoePlan,
) -> MoePlan:
    """`run`: rows and their experts, by a plan."""
    call = ("experts", shape, x_TK.dtype, len(x_TK), plan)
    return admission.serving(call, plan, lambda: ExpertsTrial(run, shape, first_expert, len(x_TK), x_TK))


def _on_each_path(
    plan: Plan, paths: Callable[[Plan], tuple[int, int | None]], admitted: Callable[[Plan, int], Plan]
) -> Plan:  # fmt: skip
    """Admitted for the rows of the split kernels, then for the tiled one, if sequences of this step go there: those
    whose split kernel was refused do, too."""
    split_rows, tiled_above = paths(plan)
    if split_rows:
        plan = admitted(plan, split_rows)
        _, tiled_above = paths(plan)
    return plan if tiled_above is None else admitted(plan, 0)
