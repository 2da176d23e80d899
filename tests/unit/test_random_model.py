"""Models of a shape with random weights: seeded, of the shape they are named after, the same whole for any ranks."""

from __future__ import annotations

import msgspec
import pytest
import torch

from benchmarks.gpu.random_model import DEEPSEEK_V2_LITE, DEEPSEEK_V3, MIXTRAL_8X7B, QWEN3_30B_A3B, random_decoder
from cluster.engine.kernels import get_ops
from cluster.engine.models.config import ExpertsConfig, ModelConfig
from tests.unit.model_factory import TOKENS, logits_of
from tests.unit.virtual_ranks import run_models

SMALL = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_size": 32,
    "ffn_size": 96,
    "vocab_size": 320,
    "max_position": 128,
    "experts": ExpertsConfig(num_experts=7, top_k=3, ffn_size=48, renormalise=True, dense_layers=(1,)),
}


def small_latent(shape: ModelConfig) -> ModelConfig:
    """Cut to the sizes of SMALL, with its own way to make queries and to choose experts."""
    assert shape.latent is not None
    assert shape.experts is not None
    rank = None if shape.latent.q_lora_rank is None else 40
    changes = {"q_lora_rank": rank, "kv_lora_rank": 32, "nope_size": 16, "rope_size": 16, "value_size": 24}
    experts = {"num_experts": 16, "top_k": 3, "ffn_size": 48, "dense_layers": (1,)}
    return msgspec.structs.replace(
        shape,
        **SMALL
        | {
            "num_kv_heads": 1,
            "latent": msgspec.structs.replace(shape.latent, **changes),
            "experts": msgspec.structs.replace(shape.experts, **experts),
        },
    )


@pytest.mark.parametrize("shape", [QWEN3_30B_A3B, MIXTRAL_8X7B])
@pytest.mark.parametrize("changes", [{}, {"experts": None, "qkv_bias": True}])
def test_a_seed_stands_for_one_model_whatever_the_ranks(shape: ModelConfig, changes: dict[str, object]) -> None:
    check_ranks(msgspec.structs.replace(shape, **SMALL | changes))


@pytest.mark.parametrize("shape", [DEEPSEEK_V2_LITE, DEEPSEEK_V3])
def test_so_it_does_with_latent_attention(shape: ModelConfig) -> None:
    check_ranks(small_latent(shape))


def check_ranks(config: ModelConfig) -> None:
    ops = get_ops("cpu", 1)
    alone = logits_of(random_decoder(config, ops, std=0.1), TOKENS)
    assert alone.isfinite().all()
    ranks, _ = run_models(lambda group: random_decoder(config, ops, group, std=0.1), 3)
    assert all(torch.equal(logits, alone) for logits in ranks)
    assert not torch.equal(logits_of(random_decoder(config, ops, std=0.1, seed=2), TOKENS), alone)


def test_shapes_have_the_sizes_they_are_known_for() -> None:
    assert round(QWEN3_30B_A3B.weight_bytes / 2e9, 1) == 30.5
    assert round(MIXTRAL_8X7B.weight_bytes / 2e9, 1) == 46.7
    assert round(DEEPSEEK_V2_LITE.weight_bytes / 2e9, 1) == 15.7
    assert round(DEEPSEEK_V3.weight_bytes / 2e9) == 671
