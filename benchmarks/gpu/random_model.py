"""Decoders with seeded random weights, dense, with experts, with latent attention, made on their device: nothing
is loaded.

For exactness and speed of shapes whose weights are not at hand. Cut a shape to fit a device with
`msgspec.structs.replace(QWEN3_30B_A3B, num_layers=4)`.
"""

from __future__ import annotations

import msgspec
import torch

from cluster.engine.kernels.fp8 import quantize_weight
from cluster.engine.kernels.ops import GroupedRouting, LinearWeight, Ops
from cluster.engine.models.config import (
    Architecture,
    ExpertsConfig,
    LatentConfig,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    WeightFormat,
    YarnScaling,
)
from cluster.engine.models.feed_forward import DenseFeedForward, FeedForward
from cluster.engine.models.latent import LatentAttention, NarrowQueries
from cluster.engine.models.llama import DecoderModel, DecoderWeights, LayerWeights
from cluster.engine.models.moe import MoeFeedForward
from cluster.engine.models.moe_grouped import GroupedMoeFeedForward
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

DEEPSEEK_V2_LITE = ModelConfig(
    architecture=Architecture.DEEPSEEK_V2,
    hidden_size=2048,
    num_layers=27,
    num_heads=16,
    num_kv_heads=1,
    head_size=192,
    ffn_size=10944,
    vocab_size=102400,
    rope_theta=10_000.0,
    rope_scaling=YarnScaling(factor=40.0, original_max_position=4096, attention_factor=1.0),
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    max_position=163_840,
    bos_token_id=100_000,
    eos_token_ids=(100_001,),
    experts=ExpertsConfig(num_experts=64, top_k=6, ffn_size=1408, renormalise=False, dense_layers=(0,), num_shared=2),
    latent=LatentConfig(
        q_lora_rank=None, kv_lora_rank=512, nope_size=128, rope_size=64, value_size=128, score_factor=1.5896
    ),
)
DEEPSEEK_V3 = ModelConfig(
    architecture=Architecture.DEEPSEEK_V3,
    hidden_size=7168,
    num_layers=61,
    num_heads=128,
    num_kv_heads=1,
    head_size=192,
    ffn_size=18432,
    vocab_size=129280,
    rope_theta=10_000.0,
    rope_scaling=YarnScaling(factor=40.0, original_max_position=4096, attention_factor=1.0),
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    max_position=163_840,
    bos_token_id=0,
    eos_token_ids=(1,),
    experts=ExpertsConfig(
        num_experts=256, top_k=8, ffn_size=2048, renormalise=True, dense_layers=(0, 1, 2), scoring="sigmoid",
        num_groups=8, top_groups=4, weight_scale=2.5, num_shared=1,
    ),
    latent=LatentConfig(
        q_lora_rank=1536, kv_lora_rank=512, nope_size=128, rope_size=64, value_size=128, score_factor=1.8738
    ),
)  # fmt: skip


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
        if config.latent is not None:
            return self.latent_layer(index, config.latent)
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

    def latent_layer(self, index: int, latent: LatentConfig) -> LayerWeights:
        config, ops, heads = self.config, self.ops, self.plan.heads.query
        hidden, rank = config.hidden_size, latent.q_lora_rank
        into_queries = self.matrix(config.num_heads * config.head_size, hidden if rank is None else rank)
        mine, queries = self.rows(into_queries, heads, config.head_size), None
        if rank is not None:
            queries = NarrowQueries(self.norm(rank), ops.pack_linear(mine))
            mine = self.matrix(rank, hidden)
        keys, values = (
            self.matrix(config.num_heads, *shape)
            for shape in ((latent.kv_lora_rank, latent.nope_size), (latent.value_size, latent.kv_lora_rank))
        )
        return LayerWeights(
            input_norm_K=self.norm(hidden),
            qkv=ops.pack_linear(torch.cat([mine, self.matrix(latent.row_size, hidden)])),
            qkv_bias_C=None,
            q_norm_D=None,
            k_norm_D=None,
            output=ops.pack_linear(
                self.rows(self.matrix(hidden, config.num_heads * latent.value_size), self.plan.hidden)
            ),
            post_attention_norm_K=self.norm(hidden),
            feed_forward=self.feed_forward(config.experts_of_layer(index)),
            latent=LatentAttention(
                queries=queries,
                cache_norm_L=self.norm(latent.kv_lora_rank),
                into_latent=ops.pack_heads(self.rows(keys, heads)),
                out_of_latent=ops.pack_heads(self.rows(values, heads)),
            ),
        )

    def dense(self, ffn: int, columns: Range) -> DenseFeedForward:
        hidden = self.config.hidden_size
        gate, up = (self.rows(self.matrix(ffn, hidden), columns) for _ in range(2))
        gate_up = self.packed(torch.cat((gate, up)))
        return DenseFeedForward(gate_up, self.packed(self.rows(self.matrix(hidden, ffn), self.plan.hidden)))

    def feed_forward(self, experts: ExpertsConfig | None) -> FeedForward:
        ops, plan, hidden = self.ops, self.plan, self.config.hidden_size
        if experts is None:
            return self.dense(self.config.ffn_size, plan.ffn)
        router = ops.pack_linear(self.matrix(experts.num_experts, hidden))
        gate_up_E = self.rows(self.matrix(experts.num_experts, 2 * experts.ffn_size, hidden), plan.experts)
        packed = ops.pack_experts(gate_up_E)
        del gate_up_E
        down = ops.pack_experts(self.rows(self.matrix(experts.num_experts, hidden, experts.ffn_size), plan.experts))
        if self.config.latent is None:
            return MoeFeedForward(router, packed, down, experts.top_k, experts.renormalise)
        bias = self.norm(experts.num_experts) - 1.0 if experts.scoring == "sigmoid" else None
        shared = self.dense(experts.num_shared * experts.ffn_size, plan.shared) if experts.num_shared else None
        routing = GroupedRouting(
            experts.top_k, experts.num_groups, experts.top_groups, experts.scoring, experts.renormalise,
            experts.weight_scale,
        )  # fmt: skip
        return GroupedMoeFeedForward(router, bias, routing, packed, down, shared)
