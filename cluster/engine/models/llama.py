"""One dense decoder: Llama (and SmolLM2), Mistral, Qwen2 and Qwen3, written in the operations of
`kernels/ops.py` only.

Shape legend: T rows of the step, C columns of the fused qkv, H query heads, G KV heads, D head size,
K hidden size, F feed-forward size, V vocabulary, P positions. `l` after a letter: this rank's part.

Tensor parallelism is "gather, then multiply": every linear layer holds some of its output columns and
reads whole rows, so each activation is gathered once before it is multiplied and the bits do not
depend on the number of ranks. The residual stream is whole on every rank.

Nothing here looks at the value of a tensor or waits for the device: with static shapes a step can be
captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight, Ops
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.models.config import ModelConfig
from cluster.engine.models.sharding_plan import ShardingPlan
from cluster.engine.parallel.group import ParallelGroup


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer on one rank. Norms and biases are fp32 vectors."""

    input_norm_K: torch.Tensor
    qkv: LinearWeight  # rows [q heads; k heads; v heads] of this rank
    qkv_bias_C: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    output: LinearWeight
    post_attention_norm_K: torch.Tensor
    gate_up: LinearWeight  # rows [gate; up] of this rank
    down: LinearWeight


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights of one rank."""

    embedding_VK: torch.Tensor | None  # bf16, whole on every rank; None: its rows are those of lm_head
    layers: tuple[LayerWeights, ...]
    final_norm_K: torch.Tensor
    lm_head: LinearWeight
    rope_table_PD: torch.Tensor


class DecoderModel:
    """Stateless: one `forward` per step. Owns its weights, not the KV cache it is given."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, ops: Ops, group: ParallelGroup) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group
        self.plan = ShardingPlan.of(config, group.rank, group.size)

    @property
    def max_position(self) -> int:
        """Positions the rotary table covers; no row may lie at or beyond it."""
        return self.weights.rope_table_PD.shape[0]

    def kv_layout(self, block_size: int) -> KVLayout:
        """The layout of this rank's KV pool."""
        return KVLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.plan.heads.kv.length,
            head_size=self.config.head_size,
            block_size=block_size,
        )

    def forward(
        self,
        token_ids_T: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        logits_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute one step: store the K and V of every row, return fp32 logits (R, V).

        `logits_indices` (R,) int64 selects the rows whose logits are wanted; None: all rows.
        """
        weights, ops, eps = self.weights, self.ops, self.config.rms_norm_eps
        residual_TK = self._embed(token_ids_T)
        normed_TK = ops.rms_norm(residual_TK, weights.layers[0].input_norm_K, eps, input_of=weights.layers[0].qkv)
        for index, layer in enumerate(weights.layers):
            attended_TK = self._attention(layer, normed_TK, kv_cache.layer(index), metadata)
            normed_TK = ops.add_rms_norm(
                residual_TK, attended_TK, layer.post_attention_norm_K, eps, input_of=layer.gate_up
            )
            update_TK = self._feed_forward(layer, normed_TK)
            is_last = index + 1 == len(weights.layers)
            norm_K = weights.final_norm_K if is_last else weights.layers[index + 1].input_norm_K
            reader = weights.lm_head if is_last else weights.layers[index + 1].qkv
            normed_TK = ops.add_rms_norm(residual_TK, update_TK, norm_K, eps, input_of=reader)
        if ops.residual_dtype == torch.float32:
            logits_RVl = self._wide_logits(_rows(residual_TK, logits_indices))
        else:
            logits_RVl = ops.linear(_rows(normed_TK, logits_indices), weights.lm_head, out_dtype=torch.float32)
        return self.group.all_gather_columns(logits_RVl, self.plan.vocab_widths)

    def _wide_logits(self, residual_RK: torch.Tensor) -> torch.Tensor:
        """Logits of an fp32 input, as the sum of two chains over bf16 inputs that add up to it.

        The input's rounding would go straight into every logprob. The weights are read once for both
        parts, and only rows whose logits are wanted pay, so it costs next to nothing.
        """
        norm_K, eps = self.weights.final_norm_K, self.config.rms_norm_eps
        normed_RK = self.ops.rms_norm(residual_RK, norm_K, eps, out_dtype=torch.float32)
        high_RK = normed_RK.bfloat16()
        low_RK = (normed_RK - high_RK.float()).bfloat16()
        both_2RVl = self.ops.linear(torch.cat((high_RK, low_RK)), self.weights.lm_head, out_dtype=torch.float32)
        high_RVl, low_RVl = both_2RVl.chunk(2)
        return high_RVl + low_RVl

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.weights.embedding_VK is None:
            return self.weights.lm_head.rows(token_ids_T).to(self.ops.residual_dtype)
        return self.ops.embedding(token_ids_T, self.weights.embedding_VK)

    def _attention(
        self, layer: LayerWeights, normed_TK: torch.Tensor, kv_N2GSD: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        ops, config = self.ops, self.config
        qkv_TCl = ops.linear(normed_TK, layer.qkv, layer.qkv_bias_C, out_dtype=torch.float32)
        q_THlD = ops.rope_and_cache(
            qkv_TCl,
            kv_N2GSD,
            metadata,
            self.weights.rope_table_PD,
            self.plan.heads.query.length,
            layer.q_norm_D,
            layer.k_norm_D,
            config.rms_norm_eps,
        )
        mixed_TCl = ops.attention(q_THlD, kv_N2GSD, metadata, config.attention_scale)
        mixed_TC = self.group.all_gather_columns(mixed_TCl, self.plan.attention_widths)
        return self._into_residual(mixed_TC, layer.output)

    def _feed_forward(self, layer: LayerWeights, normed_TK: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            active_TF = self.ops.linear_silu_mul(normed_TK, layer.gate_up, input_of=layer.down)
        else:  # an FP8 layer quantises whole rows, so after the gather
            active_TFl = self.ops.linear_silu_mul(normed_TK, layer.gate_up)
            active_TF = self.group.all_gather_columns(active_TFl, self.plan.ffn_widths)
        return self._into_residual(active_TF, layer.down)

    def _into_residual(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """(T, K) in the dtype of the residual stream: an update is not rounded before it is added."""
        update_TKl = self.ops.linear(x, weight, out_dtype=self.ops.residual_dtype)
        return self.group.all_gather_columns(update_TKl, self.plan.hidden_widths)


def _rows(x_TK: torch.Tensor, indices_R: torch.Tensor | None) -> torch.Tensor:
    return x_TK if indices_R is None else x_TK.index_select(0, indices_R)
