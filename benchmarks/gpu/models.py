"""Models of well-known shapes with seeded random weights, made on the device: nothing is loaded."""

from __future__ import annotations

import torch

from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.models.config import Architecture, Llama3Scaling, ModelConfig
from cluster.engine.models.feed_forward import DenseFeedForward, FeedForward
from cluster.engine.models.llama import DecoderModel, DecoderWeights, LayerWeights
from cluster.engine.models.rope import rope_table
from cluster.engine.parallel.group import SingleRank

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


def random_decoder(config: ModelConfig, ops: Ops, *, seed: int = 1, std: float = 0.02) -> DecoderModel:
    """Weights are normal with a usual deviation, norms are 1; the same for every call with one seed."""
    device = ops.device
    generator = torch.Generator(device=device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        empty = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
        return empty.normal_(0.0, std, generator=generator)

    def linear(rows: int, columns: int) -> LinearWeight:
        return ops.pack_linear(matrix(rows, columns))

    def feed_forward() -> FeedForward:
        return DenseFeedForward(
            gate_up=linear(2 * config.ffn_size, config.hidden_size), down=linear(config.hidden_size, config.ffn_size)
        )

    ones_K = torch.ones(config.hidden_size, device=device)
    attention, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layers = tuple(
        LayerWeights(
            input_norm_K=ones_K,
            qkv=linear(attention + 2 * kv, config.hidden_size),
            qkv_bias_C=None,
            q_norm_D=None,
            k_norm_D=None,
            output=linear(config.hidden_size, attention),
            post_attention_norm_K=ones_K,
            feed_forward=feed_forward(),
        )
        for _ in range(config.num_layers)
    )
    weights = DecoderWeights(
        embedding_VK=matrix(config.vocab_size, config.hidden_size),
        layers=layers,
        final_norm_K=ones_K,
        lm_head=linear(config.vocab_size, config.hidden_size),
        rope_table_PD=rope_table(config, config.max_position, device),
    )
    return DecoderModel(config, weights, ops, SingleRank())
