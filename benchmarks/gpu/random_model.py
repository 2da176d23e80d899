"""A decoder with seeded random weights, made on its device: nothing is loaded."""

from __future__ import annotations

import torch

from cluster.engine.kernels.ops import Ops
from cluster.engine.models.config import Architecture, Llama3Scaling, ModelConfig
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


def random_decoder(
    config: ModelConfig, ops: Ops, *, seed: int = 1, std: float = 0.02, max_position: int | None = None
) -> DecoderModel:
    """Matrices are normal with deviation `std`, norms lie around 1."""
    generator = torch.Generator(device=ops.device).manual_seed(seed)
    hidden, size = config.hidden_size, config.head_size

    def matrix(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=ops.device)
        return empty.normal_(0.0, std, generator=generator)

    def norm(length: int) -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(length, generator=generator, device=ops.device)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm_K=norm(hidden),
            qkv=ops.pack_linear(matrix((config.num_heads + 2 * config.num_kv_heads) * size, hidden)),
            qkv_bias_C=None,
            q_norm_D=None,
            k_norm_D=None,
            output=ops.pack_linear(matrix(hidden, config.num_heads * size)),
            post_attention_norm_K=norm(hidden),
            gate_up=ops.pack_linear(matrix(2 * config.ffn_size, hidden)),
            down=ops.pack_linear(matrix(hidden, config.ffn_size)),
        )

    positions = min(max_position or config.max_position, config.max_position)
    weights = DecoderWeights(
        embedding_VK=matrix(config.vocab_size, hidden),
        layers=tuple(layer() for _ in range(config.num_layers)),
        final_norm_K=norm(hidden),
        lm_head=ops.pack_linear(matrix(config.vocab_size, hidden)),
        rope_table_PD=rope_table(config, positions, ops.device),
    )
    return DecoderModel(config, weights, ops, SingleRank())
