"""Decoders with seeded random weights, dense or with experts, made on their device: nothing is loaded.

For exactness and speed of shapes whose weights are not at hand. Cut a shape to fit a device with
`msgspec.structs.replace(QWEN3_30B_A3B, num_layers=4)`.
"""

from __future__ import annotations

import msgspec
import torch

from cluster.engine.kernels.fp8 import quantize_weight
from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.models.config import (
    Architecture,
    ExpertsConfig,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    WeightFormat,
)
from cluster.engine.models.feed_forward import DenseFeedForward, FeedForward
from cluster.engine.models.llama import DecoderModel, DecoderWeights, LayerWeights
from cluster.engine.models.moe import MoeFeedForward
from cluster.engine.models.rope import rope_table
from cluster.engine.models.sharding_plan import ShardingPlan
from cluster.engine.parallel.group import ParallelGroup, SingleRank
from cluster.engine.parallel.sharding import Range

LLAMA_8B = ModelConfig(
    architecture=Architecture.LLAMA,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    ffn_size=14336,
    vocab_size=128256,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    max_position=131_072,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)
LLAMA_8B_FP8 = msgspec.structs.replace(LLAMA_8B, weight_format=WeightFormat.FP8)
QWEN3_30B_A3B = ModelConfig(
    architecture=Architecture.QWEN3_MOE,
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_size=128,
    ffn_size=6144,
    vocab_size=151936,
    rope_theta=1_000_000.0,
    rope_scaling=NoScaling(),
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    max_position=40960,
    bos_token_id=151643,
    eos_token_ids=(151645, 151643),
    experts=ExpertsConfig(num_experts=128, top_k=8, ffn_size=768, renormalise=True),
)
MIXTRAL_8X7B = ModelConfig(
    architecture=Architecture.MIXTRAL,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    ffn_size=14336,
    vocab_size=32000,
    rope_theta=1_000_000.0,
    rope_scaling=NoScaling(),
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    max_position=32768,
    bos_token_id=1,
    eos_token_ids=(2,),
    experts=ExpertsConfig(num_experts=8, top_k=2, ffn_size=14336, renormalise=True),
)


def random_decoder(
    config: ModelConfig,
    ops: Ops,
    group: ParallelGroup | None = None,
    *,
    seed: int = 1,
    std: float = 0.02,
    max_position: int | None = None,
) -> DecoderModel:
    """`group.rank`'s part of the model that `seed` stands for: the same whole model for any number of ranks.

    Matrices are normal with deviation `std`, norms and biases lie around 1 and 0. One matrix is in memory beside
    the packed ones. With the weight format FP8 the layers are quantised as a loader does it, one scale per row.
    """
    group = group or SingleRank()
    maker = _Maker(config, ops, ShardingPlan.of(config, group.rank, group.size), seed, std)
    positions = min(max_position or config.max_position, config.max_position)
    weights = DecoderWeights(
        embedding_VK=maker.matrix(config.vocab_size, config.hidden_size),
        layers=tuple(maker.layer(index) for index in range(config.num_layers)),
        final_norm_K=maker.norm(config.hidden_size),
        lm_head=ops.pack_linear(maker.rows(maker.matrix(config.vocab_size, config.hidden_size), maker.plan.vocab)),
        rope_table_PD=rope_table(config, positions, ops.device),
    )
    return DecoderModel(config, weights, ops, group)


class _Maker:
    """Draws whole tensors one after the other, so that every rank draws the same, and keeps its rows."""

    def __init__(self, config: ModelConfig, ops: Ops, plan: ShardingPlan, seed: int, std: float) -> None:
        self.config, self.ops, self.plan, self.std = config, ops, plan, std
        self.generator = torch.Generator(device=ops.device).manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self.ops.device)
        return empty.normal_(0.0, self.std, generator=self.generator)

    def norm(self, length: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(length, generator=self.generator, device=self.ops.device)

    @staticmethod
    def rows(whole: torch.Tensor, part: Range, unit: int = 1) -> torch.Tensor:
        mine = whole[part.start * unit : part.stop * unit]
        return mine if len(mine) == len(whole) else mine.clone()  # a view would keep the whole alive

    def packed(self, weight_NK: torch.Tensor) -> LinearWeight:
        """A layer's weight in the model's format; embedding, lm_head and routers are bf16 in all of them."""
        match self.config.weight_format:
            case WeightFormat.BF16:
                return self.ops.pack_linear(weight_NK)
            case WeightFormat.FP8:
                return self.ops.pack_fp8(*quantize_weight(weight_NK))
            case other:
                raise AssertionError(f"no random weights are made in {other}")

    def layer(self, index: int) -> LayerWeights:
        config, plan = self.config, self.plan
        hidden, size = config.hidden_size, config.head_size
        q = self.matrix(config.num_heads * size, hidden)
        k, v = (self.matrix(config.num_kv_heads * size, hidden) for _ in "kv")
        qkv = [
            self.rows(q, plan.heads.query, size),
            self.rows(k, plan.heads.kv, size),
            self.rows(v, plan.heads.kv, size),
        ]
        bias_C = None
        if config.qkv_bias:
            q_bias, k_bias, v_bias = (self.norm(len(each)) - 1.0 for each in (q, k, v))
            heads = ((q_bias, plan.heads.query), (k_bias, plan.heads.kv), (v_bias, plan.heads.kv))
            bias_C = torch.cat([self.rows(bias, part, size) for bias, part in heads])
        return LayerWeights(
            input_norm_K=self.norm(hidden),
            qkv=self.packed(torch.cat(qkv)),
            qkv_bias_C=bias_C,
            q_norm_D=self.norm(size) if config.qk_norm else None,
            k_norm_D=self.norm(size) if config.qk_norm else None,
            output=self.packed(self.rows(self.matrix(hidden, config.num_heads * size), plan.hidden)),
            post_attention_norm_K=self.norm(hidden),
            feed_forward=self.feed_forward(config.experts_of_layer(index)),
        )

    def feed_forward(self, experts: ExpertsConfig | None) -> FeedForward:
        ops, plan, hidden = self.ops, self.plan, self.config.hidden_size
        if experts is None:
            gate, up = (self.rows(self.matrix(self.config.ffn_size, hidden), plan.ffn) for _ in range(2))
            gate_up = self.packed(torch.cat((gate, up)))
            down = self.packed(self.rows(self.matrix(hidden, self.config.ffn_size), plan.hidden))
            return DenseFeedForward(gate_up, down)
        router = ops.pack_linear(self.matrix(experts.num_experts, hidden))
        gate_up_E = self.rows(self.matrix(experts.num_experts, 2 * experts.ffn_size, hidden), plan.experts)
        packed = ops.pack_experts(gate_up_E)
        del gate_up_E
        packed_down = ops.pack_experts(
            self.rows(self.matrix(experts.num_experts, hidden, experts.ffn_size), plan.experts)
        )
        return MoeFeedForward(router, packed, packed_down, experts.top_k, experts.renormalise)
