"""One decoder: Llama (and SmolLM2), Mistral, Qwen2, Qwen3, with experts Mixtral and Qwen3-MoE, with latent
attention DeepSeek-V2 and -V3, written in the operations of `kernels/ops.py` only.

Shape legend: T rows of the step, C columns of the fused qkv, H query heads, G KV heads, D head size,
K hidden size, V vocabulary, P positions. `l` after a letter: this rank's part.

Tensor parallelism is "gather, then multiply": every linear layer holds some of its output columns and
reads whole rows, so each activation is gathered once before it is multiplied and the bits do not
depend on the number of ranks. The residual stream is whole on every rank.

Nothing here looks at the value of a tensor or waits for the device: with static shapes a step can be
captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight, Ops, Rotation
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.models.config import ModelConfig
from cluster.engine.models.feed_forward import FeedForward, Placement
from cluster.engine.models.latent import LatentAttention
from cluster.engine.models.sharding_plan import ShardingPlan
from cluster.engine.parallel.group import ParallelGroup


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one layer on one rank. Norms and biases are fp32 vectors."""

    input_norm_K: torch.Tensor
    qkv: LinearWeight  # rows [q heads; k heads; v heads] of this rank; of latent attention as `latent.py` says
    qkv_bias_C: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    output: LinearWeight
    post_attention_norm_K: torch.Tensor
    feed_forward: FeedForward
    latent: LatentAttention | None = None  # None: K and V are cached per head


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
        self.placement = Placement(ops, group, self.plan)

    @property
    def max_position(self) -> int:
        """Positions the rotary table covers; no row may lie at or beyond it."""
        return self.weights.rope_table_PD.shape[0]

    def kv_layout(self, block_size: int) -> KVLayout:
        """The layout of this rank's KV pool."""
        latent = self.config.latent
        return KVLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.plan.heads.kv.length,
            head_size=self.config.head_size if latent is None else latent.row_size,
            block_size=block_size,
            num_planes=2 if latent is None else 1,
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
        return self.logits(self.hidden(token_ids_T, metadata, kv_cache, logits_indices))

    def hidden(
        self,
        token_ids_T: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        rows_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All layers: store K and V of every row; what `logits` reads, of the rows `rows_R` (R,) int64, None: of all.

        Nobody reads what follows the last attention of other rows, so it is not computed: of a prompt's 2,048 rows
        one is wanted, and of 32 layers' work 2 to 3 % is saved.
        """
        weights, ops, eps = self.weights, self.ops, self.config.rms_norm_eps
        residual_TK = self._embed(token_ids_T)
        normed_TK = ops.rms_norm(residual_TK, weights.layers[0].input_norm_K, eps, input_of=weights.layers[0].qkv)
        for index, layer in enumerate(weights.layers):
            is_last = index + 1 == len(weights.layers)
            window = self.config.window_of_layer(index)
            mixed_TCl = self._mixed(layer, normed_TK, kv_cache.layer(index), metadata, window)
            if is_last:
                mixed_TCl, residual_TK = _rows(mixed_TCl, rows_R), _rows(residual_TK, rows_R)
                if not len(residual_TK):  # chunks of prompts that nothing is drawn from yet
                    return residual_TK
            mixed_TC = self.group.all_gather_columns(mixed_TCl, self.plan.attention_widths)
            attended_TK = self.placement.into_residual(mixed_TC, layer.output)
            reader = layer.feed_forward.first_weight
            normed_TK = ops.add_rms_norm(residual_TK, attended_TK, layer.post_attention_norm_K, eps, input_of=reader)
            update_TK = layer.feed_forward.update(normed_TK, self.placement)
            norm_K = weights.final_norm_K if is_last else weights.layers[index + 1].input_norm_K
            reader = weights.lm_head if is_last else weights.layers[index + 1].qkv
            normed_TK = ops.add_rms_norm(residual_TK, update_TK, norm_K, eps, input_of=reader)
        return residual_TK if ops.residual_dtype == torch.float32 else normed_TK

    def logits(self, hidden_TK: torch.Tensor, indices_R: torch.Tensor | None = None) -> torch.Tensor:
        """(R, V) fp32 logits of some rows of what `hidden` returned; None: of all."""
        hidden_RK = _rows(hidden_TK, indices_R)
        if self.ops.residual_dtype == torch.float32:
            logits_RVl = self._wide_logits(hidden_RK)
        else:
            logits_RVl = self.ops.linear(hidden_RK, self.weights.lm_head, out_dtype=torch.float32)
        return self.group.all_gather_columns(logits_RVl, self.plan.vocab_widths)

    def warm_up(self, row_counts: Sequence[int], logits_counts: Sequence[int]) -> None:
        """Multiply each kind of weight with each number of rows that steps will have, on inputs of no meaning,
        so that kernels are compared and compiled before the first request."""
        layer, ops, width = self.weights.layers[0], self.ops, self.config.hidden_size
        feed_forwards = {type(each.feed_forward): each.feed_forward for each in self.weights.layers}
        for count in row_counts:
            normed_TK = torch.zeros((count, width), dtype=torch.bfloat16, device=ops.device)
            ops.linear(normed_TK, layer.qkv, layer.qkv_bias_C, out_dtype=torch.float32)
            mixed_TC = torch.zeros((count, layer.output.in_features), dtype=torch.bfloat16, device=ops.device)
            ops.linear(mixed_TC, layer.output, out_dtype=ops.residual_dtype)
            if layer.latent is not None:
                layer.latent.warm_up(count, ops)
            for feed_forward in feed_forwards.values():
                feed_forward.update(normed_TK, self.placement)
        for count in logits_counts:
            self.logits(torch.zeros((count, self.config.hidden_size), dtype=ops.residual_dtype, device=ops.device))

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

    def _mixed(
        self,
        layer: LayerWeights,
        normed_TK: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> torch.Tensor:
        """What the heads of this rank read from the cache, after the K and V of all rows are stored there."""
        ops, config = self.ops, self.config
        qkv_TCl = ops.linear(normed_TK, layer.qkv, layer.qkv_bias_C, out_dtype=torch.float32)
        rope_table_PD, scale = self.weights.rope_table_PD, config.attention_scale
        if layer.latent is not None:
            return layer.latent.mix(qkv_TCl, kv_N2GSD, metadata, rope_table_PD, scale, ops)
        num_heads = self.plan.heads.query.length
        rotation = Rotation(rope_table_PD, num_heads, layer.q_norm_D, layer.k_norm_D, config.rms_norm_eps)
        return ops.rope_attention(qkv_TCl, kv_N2GSD, metadata, rotation, scale, window=window)


def _rows(x_TK: torch.Tensor, indices_R: torch.Tensor | None) -> torch.Tensor:
    return x_TK if indices_R is None else x_TK.index_select(0, indices_R)
