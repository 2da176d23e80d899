"""Latent attention: DeepSeek-V2 and -V3 against transformers in fp32, ranks, and what is refused, by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cluster.control.handshake import shard_from_pb, shard_to_pb
from cluster.control.identity import kv_identity
from cluster.engine.models.moe_grouped import GroupedMoeFeedForward
from cluster.errors import ConfigError, ModelError
from kvconnector.base import PeerDescription
from kvconnector.mapping import Shard
from tests.unit.model_factory import LATENT_FAMILIES, TOKENS, assert_close_to, logits_of, random_model, save_safetensors
from tests.unit.virtual_ranks import load, run_ranks


def choice_margin(model: PreTrainedModel) -> float:
    """The least distance of a chosen expert (or group) from one not chosen, over all tokens and layers."""
    config = model.config
    margins: list[float] = []

    def margin(values: torch.Tensor, count: int) -> float:
        ranked = values.sort(dim=1, descending=True).values
        return float((ranked[:, count - 1] - ranked[:, count]).min() / values[values.isfinite()].std())

    def look(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        logits = outputs[0]
        is_v3 = config.model_type == "deepseek_v3"
        ranking = logits.sigmoid() + module.e_score_correction_bias if is_v3 else logits.softmax(dim=1)
        if is_v3 or config.topk_method == "group_limited_greedy":
            groups = ranking.view(len(logits), config.n_group, -1)
            value = groups.topk(2, dim=2).values.sum(dim=2) if is_v3 else groups.amax(dim=2)
            if config.topk_group < config.n_group:
                margins.append(margin(value, config.topk_group))
            is_out = torch.ones_like(value, dtype=torch.bool)
            is_out.scatter_(1, value.topk(config.topk_group, dim=1).indices, False)
            ranking = ranking.masked_fill(is_out.repeat_interleave(groups.shape[2], dim=1), -torch.inf)
        margins.append(margin(ranking, config.num_experts_per_tok))

    hooks = [layer.mlp.gate.register_forward_hook(look) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with torch.inference_mode():
        model(TOKENS[None])
    for hook in hooks:
        hook.remove()
    return min(margins, default=1.0)


def decided_model(family: str, **overrides: object) -> PreTrainedModel:
    """A random model in which no token is so near a tie that rounding to bf16 gives it another expert."""
    models = (random_model(family, seed, **overrides) for seed in itertools.count())
    return next(model for model in itertools.islice(models, 200) if choice_margin(model) > 0.005)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("deepseek_v2", {}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0, "q_lora_rank": 40}),
        ("deepseek_v2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None, "norm_topk_prob": False, "first_k_dense_replace": 0}),
        ("deepseek_v3", {"first_k_dense_replace": 3}),
    ],
)
def test_model_agrees_with_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = decided_model(family, **overrides)
    save_safetensors(reference, tmp_path)
    assert_close_to(reference, load(tmp_path).model)


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_weight_bytes_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    reference = random_model(family)
    config = load(save_safetensors(reference, tmp_path)).config
    biases = sum(each.numel() for name, each in reference.named_buffers() if name.endswith("correction_bias"))
    assert config.weight_bytes == 2 * (sum(each.numel() for each in reference.parameters()) + biases)


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_ranks_give_the_bits_of_one_and_all_hold_the_rows(family: str, tmp_path: Path) -> None:
    save_safetensors(random_model(family), tmp_path)
    model = load(tmp_path).model
    alone = logits_of(model, TOKENS)
    assert alone.isfinite().all()
    logits, pools = run_ranks(tmp_path, 3)
    assert all(torch.equal(each, alone) for each in logits)
    assert torch.equal(pools[:, :, :, :1], pools[:, :, :, 1:2])
    assert torch.equal(pools[:, :, :, :1], pools[:, :, :, 2:])
    layout = model.kv_layout(16)
    assert (layout.num_planes, layout.num_kv_heads, layout.head_size) == (1, 1, 48)
    assert layout.block_bytes == 3 * 16 * 48 * 2


def test_the_handshake_knows_rows_from_keys_and_values(tmp_path: Path) -> None:
    loaded = load(save_safetensors(random_model("deepseek_v2"), tmp_path))
    layout = loaded.model.kv_layout(16)
    identity = kv_identity(loaded, layout, "cpu/1", "loopback")
    assert (identity.attention_kind, identity.kv_layout) == ("mla", "NL1HSD")
    assert (identity.num_kv_heads, identity.head_size) == (1, 48)
    peer = PeerDescription("engine", "loopback", b"", ())
    assert shard_from_pb(shard_to_pb(Shard(layout=layout), peer))[0].layout == layout
    message = shard_to_pb(Shard(layout=layout), peer)
    message.layout.num_planes = 0  # as an older peer sends it: K and V
    assert shard_from_pb(message)[0].layout.num_planes == 2
    message.layout.num_planes = 3
    with pytest.raises(ValueError, match="num_planes is 3"):
        shard_from_pb(message)


def test_first_layers_are_dense_and_layers_that_draft_are_not_read(tmp_path: Path) -> None:
    path = save_safetensors(random_model("deepseek_v3", num_nextn_predict_layers=1), tmp_path) / "model.safetensors"
    plain = load(tmp_path)
    kinds = [isinstance(layer.feed_forward, GroupedMoeFeedForward) for layer in plain.model.weights.layers]
    assert kinds == [False, True, True]
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    save_file(load_file(path) | extra, path)
    assert torch.equal(logits_of(load(tmp_path).model, TOKENS), logits_of(plain.model, TOKENS))
    edit(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match="1 tensors are not part of the deepseek_v3"):
        load(tmp_path)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave false is not supported"),
        (
            "deepseek_v3",
            {"n_group": None, "topk_group": None},
            "deepseek_v3 with n_routed_experts needs n_group, topk_group",
        ),
        ("deepseek_v3", {"routed_scaling_factor": None}, "needs routed_scaling_factor"),
        ("deepseek_v3", {"n_group": 3}, "8 experts do not divide into 3 groups"),
        ("deepseek_v3", {"topk_group": 1}, "1 of 4 groups of 2 experts make no sense for 3 experts"),
        ("deepseek_v3", {"qk_rope_head_dim": 15}, "head_size 15 is odd"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank 0"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is not supported for deepseek_v3"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is not supported for deepseek_v2"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok and moe_intermediate_size are needed"),
        (
            "deepseek_v2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "mscale 0.7 and no mscale_all_dim is not supported",
        ),
        (
            "deepseek_v3",
            {"quantization_config": FP8},
            "FP8 is served for dense models only",
        ),
        (
            "deepseek_v3",
            {"first_k_dense_replace": 3, "quantization_config": FP8},
            "FP8 is not served with latent attention",
        ),
    ],
)  # fmt: skip
def test_unsupported_or_senseless_config(family: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    edit(save_safetensors(random_model(family), tmp_path), **changes)
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_more_ranks_than_heads_allow_are_refused(tmp_path: Path) -> None:
    save_safetensors(random_model("deepseek_v2"), tmp_path)
    with pytest.raises(ConfigError, match="tensor parallel size 4 does not fit 6 heads"):
        run_ranks(tmp_path, 4)
