"""Mixtures of experts: against transformers in fp32, from both file formats, and what is refused, by name."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cluster.engine.models.moe import MoeFeedForward
from cluster.errors import ConfigError, ModelError
from tests.unit.model_factory import TOKENS, assert_close_to, logits_of, random_model, save_gguf, save_safetensors
from tests.unit.virtual_ranks import VirtualRank, load

ROUTER = "model.layers.1.mlp.gate.weight"


def router_margin(model: PreTrainedModel) -> float:
    """The least distance of a token's last chosen expert from the first one not chosen, over the spread of logits."""
    with torch.inference_mode():
        layers = model(TOKENS[None], output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    ranked = [logits.sort(dim=1, descending=True).values for logits in layers]
    return min(float((each[:, top_k - 1] - each[:, top_k]).min() / each.std()) for each in ranked)


def decided_model(family: str, **overrides: object) -> PreTrainedModel:
    """A random model in which no token is so near a tie that rounding to bf16 gives it another expert."""
    models = (random_model(family, seed, **overrides) for seed in itertools.count())
    return next(model for model in itertools.islice(models, 100) if router_margin(model) > 0.02)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
    ],
)
def test_safetensors_model_agrees_with_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = decided_model(family, **overrides)
    save_safetensors(reference, tmp_path)
    assert_close_to(reference, load(tmp_path).model)


def test_layers_without_experts_are_dense(tmp_path: Path) -> None:
    save_safetensors(
        random_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[3], decoder_sparse_step=2), tmp_path
    )
    loaded = load(tmp_path)
    assert loaded.config.experts is not None
    assert loaded.config.experts.dense_layers == (0, 2, 3)
    kinds = [isinstance(layer.feed_forward, MoeFeedForward) for layer in loaded.model.weights.layers]
    assert kinds == [False, True, False, False]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("overrides", [{}, {"mlp_only_layers": [0]}])
def test_weight_bytes_are_those_of_the_file(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = random_model(family, **(overrides if family == "qwen3_moe" else {}))
    config = load(save_safetensors(reference, tmp_path)).config
    head_norms = 2 * config.head_size * config.num_layers if config.qk_norm else 0  # too small to be counted
    assert config.weight_bytes == 2 * (sum(each.numel() for each in reference.parameters()) - head_norms)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_quantised_experts_of_a_gguf_are_those_of_their_place(family: str, tmp_path: Path) -> None:
    reference = random_model(family)
    path = save_gguf(reference, tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1 and not name.endswith("gate.weight"):
                blocks = gguf.quants.quantize(parameter.numpy(), GGMLQuantizationType.Q8_0)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)))
    directory = save_safetensors(reference, tmp_path / "directory")
    assert torch.equal(logits_of(load(path).model, TOKENS), logits_of(load(directory).model, TOKENS))


def test_gguf_with_a_tensor_for_each_expert(tmp_path: Path) -> None:
    reference = random_model("mixtral")
    fused = save_gguf(reference, tmp_path / "fused.gguf", GGMLQuantizationType.F16)
    split = save_gguf(reference, tmp_path / "split.gguf", GGMLQuantizationType.F16, split_experts=True)
    assert torch.equal(logits_of(load(split).model, TOKENS), logits_of(load(fused).model, TOKENS))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "9 of 8 experts per token"),
        ({"num_experts_per_tok": 0}, "0 of 8 experts per token"),
        ({"num_local_experts": 0}, "0 experts in a layer, supported are 1 to 1024"),
        ({"num_local_experts": 5000}, "5000 experts in a layer"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size are needed"),
        ({"moe_intermediate_size": -1}, "feed-forward size of an expert is -1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"shared_expert_intermediate_size": 64}, r"shared experts \(shared_expert_intermediate_size\)"),
        ({"n_shared_experts": 1}, r"shared experts \(n_shared_experts\)"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "together with max_window_layers"),
        ({"attention_bias": True}, "attention_bias is not supported for qwen3_moe"),
    ],
)
def test_unsupported_or_senseless_config(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    edit(save_safetensors(random_model("qwen3_moe"), tmp_path), **changes)
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path)
    assert "config.json" in caught.value.message


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda writer: writer.add_expert_shared_count(1), r"shared experts \(qwen3moe.expert_shared_count\)"),
        (lambda writer: writer.add_expert_weights_scale(2.5), "expert_weights_scale is not supported"),
        (
            lambda writer: writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
            "expert_gating_func is not softmax",
        ),
    ],
)
def test_gguf_with_another_kind_of_mixture(
    write: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_expert_count

    def add_count_and_more(writer: gguf.GGUFWriter, count: int) -> None:
        add(writer, count)
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "add_expert_count", add_count_and_more)
    path = save_gguf(random_model("qwen3_moe"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    with pytest.raises(ModelError, match=words):
        load(path)


def test_tensors_of_experts_are_missed_and_noticed_on_every_rank(tmp_path: Path) -> None:
    path = save_safetensors(random_model("qwen3_moe"), tmp_path) / "model.safetensors"
    whole = load_file(path)
    last = "model.layers.1.mlp.experts.7.up_proj.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != last}, path)
    for rank in (0, 2):
        with pytest.raises(ModelError, match=rf"'{last}' is missing"):
            load(tmp_path, VirtualRank(rank, 3, threading.Barrier(1), []))
    more = "model.layers.1.mlp.experts.8.up_proj.weight"
    save_file(whole | {more: whole[last].clone()}, path)
    with pytest.raises(ModelError, match=rf"1 tensors are not part of the qwen3_moe .*'{more}'"):
        load(tmp_path)


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    save_safetensors(random_model("mixtral", num_local_experts=2), tmp_path)
    with pytest.raises(ConfigError, match="3 ranks cannot share 2 experts"):
        load(tmp_path, VirtualRank(0, 3, threading.Barrier(1), []))
