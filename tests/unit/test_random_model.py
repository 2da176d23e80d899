"""Models of a shape with random weights: seeded, of the shape they are named after, the same whole for any ranks."""

from __future__ import annotations

import msgspec
import pytest
import torch

from benchmarks.gpu.random_model import MIXTRAL_8X7B, QWEN3_30B_A3B, random_decoder
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


@pytest.mark.parametrize("shape", [QWEN3_30B_A3B, MIXTRAL_8X7B])
@pytest.mark.parametrize("changes", [{}, {"experts": None, "qkv_bias": True}])
def test_a_seed_stands_for_one_model_whatever_the_ranks(shape: ModelConfig, changes: dict[str, object]) -> None:
    config = msgspec.structs.replace(shape, **SMALL | changes)
    ops = get_ops("cpu", 1)
    alone = logits_of(random_decoder(config, ops, std=0.1), TOKENS)
    assert alone.isfinite().all()
    ranks, _ = run_models(lambda group: random_decoder(config, ops, group, std=0.1), 3)
    assert all(torch.equal(logits, alone) for logits in ranks)
    assert not torch.equal(logits_of(random_decoder(config, ops, std=0.1, seed=2), TOKENS), alone)


def test_shapes_have_the_sizes_they_are_known_for() -> None:
    assert round(QWEN3_30B_A3B.weight_bytes / 2e9, 1) == 30.5
    assert round(MIXTRAL_8X7B.weight_bytes / 2e9, 1) == 46.7
