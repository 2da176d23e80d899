"""The decoder against transformers in fp32, on tiny random models of every family and file format."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.models.feed_forward import DenseFeedForward
from cluster.errors import ConfigError
from tests.unit.model_factory import (
    DENSE_FAMILIES,
    TOKENS,
    assert_close_to,
    logits_of,
    random_model,
    save_gguf,
    save_safetensors,
    whole_sequence,
)
from tests.unit.virtual_ranks import VirtualRank, load, run_ranks


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_safetensors_model_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    reference = random_model(family)
    save_safetensors(reference, tmp_path)
    assert_close_to(reference, load(tmp_path).model)


@pytest.mark.parametrize(
    ("family", "encoding"),
    [("llama", "F16"), ("llama", "Q4_1"), ("llama", "Q8_0"), ("qwen2", "Q4_0"), ("qwen2", "Q8_0")],
)
def test_gguf_model_agrees_with_transformers_on_the_same_file(family: str, encoding: str, tmp_path: Path) -> None:
    path = save_gguf(random_model(family), tmp_path / "tiny.gguf", GGMLQuantizationType[encoding])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    assert_close_to(reference, load(path).model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_unquantised_gguf_and_safetensors_give_the_same_bits(family: str, tmp_path: Path) -> None:
    reference = random_model(family)
    path = save_gguf(reference, tmp_path / "tiny.gguf", GGMLQuantizationType.BF16)
    directory = save_safetensors(reference, tmp_path / "directory")
    assert torch.equal(logits_of(load(path).model, TOKENS), logits_of(load(directory).model, TOKENS))


def test_sharded_safetensors_give_the_same_bits(tmp_path: Path) -> None:
    reference = random_model("qwen2")
    whole = save_safetensors(reference, tmp_path / "whole")
    sharded = save_safetensors(reference, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(whole).model, TOKENS), logits_of(load(sharded).model, TOKENS))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("rows", [(19, 0, 7), (5, 5, 5, 5), ()])
def test_selected_rows_have_the_bits_they_have_among_all_rows(
    family: str, rows: tuple[int, ...], tmp_path: Path
) -> None:
    """And the K and V of the others are stored."""
    model = load(save_safetensors(random_model(family), tmp_path)).model
    step, whole = (whole_sequence(model, len(TOKENS)) for _ in range(2))
    indices = torch.tensor(rows, dtype=torch.int64)
    selected = model.forward(TOKENS, step.metadata, step.cache, indices)
    assert torch.equal(selected, model.forward(TOKENS, whole.metadata, whole.cache)[indices])
    assert torch.equal(step.cache.kv_NL2HSD.view(torch.int16), whole.cache.kv_NL2HSD.view(torch.int16))


def test_what_follows_the_last_attention_is_computed_for_selected_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(save_safetensors(random_model("llama"), tmp_path)).model
    rows_of: dict[int, list[int]] = defaultdict(list)
    linear = type(model.ops).linear

    def counting(self: Ops, x_TK: torch.Tensor, weight: LinearWeight, *more: Any, **named: Any) -> torch.Tensor:
        rows_of[id(weight)].append(len(x_TK))
        return linear(self, x_TK, weight, *more, **named)

    monkeypatch.setattr(type(model.ops), "linear", counting)
    step = whole_sequence(model, len(TOKENS))
    model.forward(TOKENS, step.metadata, step.cache, torch.tensor([19, 4]))
    *others, last = model.weights.layers
    assert others
    for layer in others:
        assert isinstance(layer.feed_forward, DenseFeedForward)
        assert rows_of[id(layer.output)] == rows_of[id(layer.feed_forward.down)] == [len(TOKENS)]
    assert isinstance(last.feed_forward, DenseFeedForward)
    assert rows_of[id(last.qkv)] == [len(TOKENS)]
    assert rows_of[id(last.output)] == rows_of[id(last.feed_forward.down)] == [2]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ranks_give_selected_rows_the_bits_of_one(family: str, tmp_path: Path) -> None:
    save_safetensors(random_model(family), tmp_path)
    rows = torch.tensor([19, 0, 7])
    (alone,), kv_alone = run_ranks(tmp_path, 1)
    ranks, kv = run_ranks(tmp_path, 3, rows)
    assert all(torch.equal(logits, alone[rows]) for logits in ranks)
    assert torch.equal(kv.view(torch.int16), kv_alone.view(torch.int16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("size", [2, 3])
def test_tensor_parallel_ranks_give_the_bits_of_one(family: str, size: int, tmp_path: Path) -> None:
    save_safetensors(random_model(family), tmp_path)
    (alone,), kv_alone = run_ranks(tmp_path, 1)
    ranks, kv = run_ranks(tmp_path, size)
    for logits in ranks:
        assert torch.equal(logits.view(torch.int32), alone.view(torch.int32))
    assert torch.equal(kv.view(torch.int16), kv_alone.view(torch.int16))


def test_more_ranks_than_kv_heads_share_them(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    (alone,), _ = run_ranks(path, 1)
    ranks, kv = run_ranks(path, 6)
    assert all(torch.equal(logits, alone) for logits in ranks)
    assert torch.equal(kv[:, :, :, 0::2], kv[:, :, :, 1::2])  # each KV head is held by two ranks


def test_a_number_of_ranks_that_cannot_share_the_heads_is_refused(tmp_path: Path) -> None:
    save_safetensors(random_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"tensor parallel size 4 does not fit 6 heads and 3 KV heads"):
        load(tmp_path, VirtualRank(0, 4, threading.Barrier(1), []))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_held_once_and_read_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    reference = random_model("llama", vocab_size=309, tie_word_embeddings=tied)
    weights = load(save_safetensors(reference, tmp_path)).model.weights
    assert (weights.embedding_VK is None) == tied
    rows = torch.tensor([0, 308, 15, 16, 17, 300, 16])
    assert torch.equal(weights.lm_head.rows(rows), reference.lm_head.weight[rows].bfloat16())
