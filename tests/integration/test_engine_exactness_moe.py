"""The engine over a tiny mixture of experts: tokens, logprob bits and KV bytes whatever the batch and the chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.engine.kernels import get_ops
from cluster.engine.kernels.mutations import break_kernel
from decode.policy import DecodePolicy
from tests.integration.test_engine_exactness import NUM_THREADS, Answer, Lab, requests, run
from tests.unit.model_factory import random_model, save_safetensors

BATCH = requests()[2::2]  # prompts of 16 to 150 tokens, each way of sampling


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], num_experts_per_tok=6)
    return save_safetensors(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lab(model_directory: Path) -> Lab:
    return Lab(model_directory, get_ops("cpu", NUM_THREADS))


def each_alone(lab: Lab) -> tuple[dict[str, Answer], dict[str, str]]:
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in BATCH:
        one = run(lab.engine(DecodePolicy(), max_batched_tokens=256), [request])
        answers |= one[0]
        digests |= one[1]
    return answers, digests


@pytest.fixture(scope="module")
def reference(lab: Lab) -> tuple[dict[str, Answer], dict[str, str]]:
    return each_alone(lab)


@pytest.mark.parametrize("max_batched_tokens", [16, 97, 512])
def test_chunks_and_neighbours_do_not_change_bits(
    lab: Lab, reference: tuple[dict[str, Answer], dict[str, str]], max_batched_tokens: int
) -> None:
    engine = lab.engine(DecodePolicy(), num_blocks=200, max_batched_tokens=max_batched_tokens)
    assert run(engine, BATCH) == reference
    assert run(engine, BATCH) == reference  # now with what is left in the prefix cache
    assert engine.load().cached_tokens > 0


def test_a_combination_whose_order_depends_on_the_batch_is_noticed(model_directory: Path) -> None:
    broken = Lab(model_directory, break_kernel(get_ops("cpu", NUM_THREADS), "moe"))
    together, _ = run(broken.engine(DecodePolicy(), num_blocks=200), BATCH)
    alone, _ = each_alone(broken)
    assert sum(alone[key] != together[key] for key in alone) > 0  # logprobs: rounding K and V to bf16 hides much
