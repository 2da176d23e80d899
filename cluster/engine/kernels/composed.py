"""An `Ops` whose operations come from different implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import (
    AttentionMetadata,
    ExpertChoice,
    ExpertWeight,
    GroupedRouting,
    HeadWeight,
    LinearWeight,
    Ops,
    TwoStepAttention,
)


@dataclass(frozen=True, slots=True)
class ComposedOps(TwoStepAttention):
    """Each field serves a family of operations; families share packed data only within themselves."""

    name: str
    device: torch.device
    residual_dtype: torch.dtype
    linear_family: Ops
    attention_family: Ops
    rope_family: Ops
    norm_family: Ops
    embedding_family: Ops
    softmax_family: Ops
    moe_family: Ops
    latent_family: Ops

    def pack_linear(self, weight_NK: torch.Tensor) -> LinearWeight:
        return self.linear_family.pack_linear(weight_NK)

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> LinearWeight:
        return self.linear_family.pack_fp8(values_NK, scale)

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        return self.linear_family.linear(x_TK, weight, bias_N, out_dtype=out_dtype)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        return self.linear_family.linear_silu_mul(x_TK, gate_up, input_of=input_of)

    def embedding(self, token_ids_T: torch.Tensor, table_VK: torch.Tensor) -> torch.Tensor:
        return self.embedding_family.embedding(token_ids_T, table_VK)

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        return self.norm_family.rms_norm(x_TK, weight_K, eps, out_dtype=out_dtype, input_of=input_of)

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        return self.norm_family.add_rms_norm(residual_TK, update_TK, weight_K, eps, input_of=input_of)

    def rope_and_cache(
        self,
        qkv_TC: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PD: torch.Tensor,
        num_heads: int,
        q_norm_D: torch.Tensor | None = None,
        k_norm_D: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        return self.rope_family.rope_and_cache(
            qkv_TC, kv_N2GSD, metadata, cos_sin_PD, num_heads, q_norm_D, k_norm_D, norm_eps
        )

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        return self.attention_family.attention(q_THD, kv_N2GSD, metadata, scale, window=window)

    def pack_heads(self, weight_HNK: torch.Tensor) -> HeadWeight:
        return self.latent_family.pack_heads(weight_HNK)

    def head_linear(self, x_THK: torch.Tensor, weight: HeadWeight) -> torch.Tensor:
        return self.latent_family.head_linear(x_THK, weight)

    def latent_rope_and_cache(
        self,
        q_TC: torch.Tensor,
        row_TD: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PR: torch.Tensor,
        num_heads: int,
        norm_L: torch.Tensor,
        norm_eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latent_family.latent_rope_and_cache(
            q_TC, row_TD, kv_N11SD, metadata, cos_sin_PR, num_heads, norm_L, norm_eps
        )

    def latent_attention(
        self,
        q_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        return self.latent_family.latent_attention(q_THL, q_rope_THR, kv_N11SD, metadata, scale)

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.softmax_family.log_softmax_stats(logits_TV)

    def softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        return self.softmax_family.softmax(logits_TV)

    def argmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        return self.softmax_family.argmax(logits_TV)

    def pack_experts(self, weight_ENK: torch.Tensor) -> ExpertWeight:
        return self.moe_family.pack_experts(weight_ENK)

    def moe_route(self, logits_TE: torch.Tensor, top_k: int, *, renormalise: bool) -> ExpertChoice:
        return self.moe_family.moe_route(logits_TE, top_k, renormalise=renormalise)

    def moe_route_grouped(
        self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: GroupedRouting
    ) -> ExpertChoice:
        return self.moe_family.moe_route_grouped(logits_TE, bias_E, routing)

    def moe_experts(
        self,
        x_TK: torch.Tensor,
        experts_TJ: torch.Tensor,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        *,
        first_expert: int = 0,
    ) -> torch.Tensor:
        return self.moe_family.moe_experts(x_TK, experts_TJ, gate_up, down, first_expert=first_expert)

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        return self.moe_family.moe_combine(rows_TJK, weights_TJ)


class DelegatingOps(ComposedOps):
    """All families from one implementation; a subclass overrides some operations."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops.name, ops.device, ops.residual_dtype, *[ops] * 8)
