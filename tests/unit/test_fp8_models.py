"""FP8 models: made of bf16 ones as they load, read from checkpoints of both kinds, refused by name otherwise."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from cluster.control.identity import kv_identity
from cluster.engine.kernels import fingerprint, get_ops
from cluster.engine.kernels.fp8 import dequantize_weight
from cluster.engine.models.config import WeightFormat
from cluster.engine.models.feed_forward import DenseFeedForward
from cluster.engine.models.llama import LayerWeights
from cluster.engine.models.loader import LoadedModel, load_model
from cluster.engine.parallel.group import ParallelGroup, SingleRank
from cluster.errors import ModelError
from kvconnector.core.handshake import compare
from tests.unit.fp8_checkpoints import (
    BLOCK_CONFIG,
    CHANNEL_CONFIG,
    is_layer_linear,
    make_block_checkpoint,
    make_channel_checkpoint,
    write,
)
from tests.unit.model_factory import (
    DENSE_FAMILIES,
    TOKENS,
    logits_of,
    random_model,
    save_gguf,
    save_safetensors,
)
from tests.unit.virtual_ranks import CPU, run_models

Quantization = Literal["fp8"] | None


def dense(layer: LayerWeights) -> DenseFeedForward:
    assert isinstance(layer.feed_forward, DenseFeedForward)
    return layer.feed_forward


def load(path: Path, quantization: Quantization = None, group: ParallelGroup | None = None) -> LoadedModel:
    return load_model(path, get_ops("cpu", 1), group or SingleRank(), CPU, quantization=quantization)


def bf16_directory(family: str, path: Path) -> Path:
    return save_safetensors(random_model(family), path)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_logits_of_every_format_are_near_those_of_bf16(family: str, tmp_path: Path) -> None:
    """The models have two layers of 96: what FP8 costs here bounds what it may cost, it does not predict it."""
    bf16 = logits_of(load(bf16_directory(family, tmp_path / "bf16")).model, TOKENS)
    made = load(tmp_path / "bf16", "fp8")
    block = load(make_block_checkpoint(bf16_directory(family, tmp_path / "block")))
    channel = load(make_channel_checkpoint(bf16_directory(family, tmp_path / "channel")))
    assert [m.config.weight_format for m in (made, block, channel)] == ["fp8", "fp8_block", "fp8"]
    errors = [relative_error(logits_of(m.model, TOKENS), bf16) for m in (made, block, channel)]
    assert all(0.01 < error < 0.12 for error in errors), errors
    # The same rows, quantised by the same formula, whoever did it.
    assert torch.equal(logits_of(made.model, TOKENS), logits_of(channel.model, TOKENS))


def test_a_block_checkpoint_is_read_as_what_it_stands_for(tmp_path: Path) -> None:
    """Beside a bf16 model of the dequantised weights, which bf16 represents well: only activations differ."""
    directory = make_block_checkpoint(bf16_directory("qwen3", tmp_path / "fp8"), torch.float32)
    tensors = load_file(directory / "model.safetensors")
    for name in filter(is_layer_linear, list(tensors)):
        scale = tensors.pop(f"{name}_scale_inv")
        values = torch.nn.functional.pad(tensors[name].float(), (0, 0, 0, -len(tensors[name]) % 128))
        tensors[name] = dequantize_weight(values, scale)[: len(tensors[name])].bfloat16()
    plain = write(bf16_directory("qwen3", tmp_path / "bf16"), tensors, None)
    error = relative_error(logits_of(load(directory).model, TOKENS), logits_of(load(plain).model, TOKENS))
    assert 0.005 < error < 0.08


def run_ranks(path: Path, size: int, quantization: Quantization) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every rank's logits, and the KV pools side by side."""
    return run_models(lambda group: load(path, quantization, group).model, size)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("make", "quantization"),
    [(lambda path: path, "fp8"), (make_block_checkpoint, None), (make_channel_checkpoint, None)],
    ids=["made", "block", "channel"],
)
def test_ranks_give_the_bits_of_one(
    make: Callable[[Path], Path], quantization: Quantization, size: int, tmp_path: Path
) -> None:
    """Shares of 48 and 32 rows: blocks of 128 are cut by the ranks and by the heads."""
    path = make(bf16_directory("qwen3", tmp_path))
    (alone,), kv_alone = run_ranks(path, 1, quantization)
    ranks, kv = run_ranks(path, size, quantization)
    assert all(torch.equal(logits.view(torch.int32), alone.view(torch.int32)) for logits in ranks)
    assert torch.equal(kv.view(torch.int16), kv_alone.view(torch.int16))


def test_rows_do_not_depend_on_what_follows_them(tmp_path: Path) -> None:
    model = load(bf16_directory("llama", tmp_path), "fp8").model
    whole = logits_of(model, TOKENS)
    for length in (1, 7, 13):
        assert torch.equal(logits_of(model, TOKENS[:length]), whole[:length])


def test_a_gguf_file_can_be_made_fp8(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.BF16)
    made = load(path, "fp8")
    directory = load(bf16_directory("llama", tmp_path / "directory"), "fp8")
    assert made.identity.quantisation == "BF16+F32>fp8"
    assert torch.equal(logits_of(made.model, TOKENS), logits_of(directory.model, TOKENS))


def test_embedding_and_lm_head_stay_bf16(tmp_path: Path) -> None:
    reference = random_model("mistral")
    weights = load(save_safetensors(reference, tmp_path), "fp8").model.weights
    rows = torch.tensor([0, 319, 15])
    assert torch.equal(weights.lm_head.rows(rows), reference.lm_head.weight[rows].bfloat16())
    assert weights.embedding_VK is not None
    with pytest.raises(AssertionError, match="never FP8"):
        dense(weights.layers[0]).down.rows(rows)


def test_a_layer_that_a_checkpoint_left_in_bf16_stays_bf16(tmp_path: Path) -> None:
    bf16 = load(bf16_directory("qwen2", tmp_path / "bf16")).model.weights.layers[0]
    path = make_channel_checkpoint(bf16_directory("qwen2", tmp_path / "mixed"), keep_bf16=("down_proj", "o_proj"))
    model = load(path).model
    layer = model.weights.layers[0]
    assert type(dense(layer).down) is type(layer.output) is type(dense(bf16).down)
    assert type(layer.qkv) is type(dense(layer).gate_up) is not type(dense(bf16).down)
    assert relative_error(logits_of(model, TOKENS), logits_of(load(tmp_path / "bf16").model, TOKENS)) < 0.12


def test_an_fp8_checkpoint_stays_what_it_is_when_fp8_is_asked_for(tmp_path: Path) -> None:
    path = make_block_checkpoint(bf16_directory("llama", tmp_path))
    assert load(path, "fp8").identity == load(path).identity
    assert load(path, "fp8").config.weight_format is WeightFormat.FP8_BLOCK


def test_an_fp8_and_a_bf16_worker_do_not_pair(tmp_path: Path) -> None:
    path = bf16_directory("llama", tmp_path)
    ops = get_ops("cpu", 1)

    def identity_of(quantization: Quantization) -> Any:
        loaded = load(path, quantization)
        bits_of_kernels = fingerprint(ops, with_fp8=loaded.config.weight_format is not WeightFormat.BF16)
        return kv_identity(loaded, loaded.model.kv_layout(16), bits_of_kernels, "loopback")

    bf16, fp8 = identity_of(None), identity_of("fp8")
    assert compare(fp8, identity_of("fp8")) == ()
    mismatches = {mismatch.field: mismatch for mismatch in compare(bf16, fp8)}
    assert set(mismatches) == {"config_digest", "quantisation", "numeric_fingerprint"}
    assert (mismatches["quantisation"].ours, mismatches["quantisation"].theirs) == ("BF16", "BF16>fp8")


def test_a_cpu_says_that_fp8_is_emulated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = bf16_directory("llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        load(path)
        assert not caplog.records
        load(path, "fp8")
    assert "FP8 on a CPU is emulated" in caplog.text


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one value replaced; `path` has dots."""
    result = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = result
    for key in parents:
        place = place[key]
    place[last] = value
    return result


GROUP = "config_groups.group_0"
REFUSED = [
    (changed(BLOCK_CONFIG, "weight_block_size", [64, 64]), r"weight_block_size is \[64,64\], only \[128,128\]"),
    (changed(BLOCK_CONFIG, "weight_block_size", None), "weight_block_size is null"),
    (changed(BLOCK_CONFIG, "activation_scheme", "static"), 'activation_scheme is "static"'),
    (changed(BLOCK_CONFIG, "fmt", "e5m2"), 'fmt is "e5m2"'),
    (changed(BLOCK_CONFIG, "scale_fmt", "ue8m0"), 'scale_fmt is "ue8m0"'),
    ({"quant_method": "gptq"}, "quantization_config 'gptq' is not supported; use FP8"),
    ({}, "quantization_config 'unnamed'"),
    (changed(CHANNEL_CONFIG, "format", "int-quantized"), 'format is "int-quantized"'),
    (changed(CHANNEL_CONFIG, "kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is not supported"),
    (changed(CHANNEL_CONFIG, "config_groups", {}), "config_groups is empty"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.weights.strategy", "tensor"), 'weights.strategy is "tensor", only "channel"'),
    (changed(CHANNEL_CONFIG, f"{GROUP}.weights.type", "int"), 'weights.type is "int"'),
    (changed(CHANNEL_CONFIG, f"{GROUP}.weights.num_bits", 4), "weights.num_bits is 4"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.weights", None), 'weights.type is "int"'),
    (changed(CHANNEL_CONFIG, f"{GROUP}.input_activations", None), "input_activations.type"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.input_activations.dynamic", False), "input_activations.dynamic is false"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.input_activations.strategy", "tensor"), "input_activations.strategy"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.targets", ["re:.*mlp.*"]), r"targets is \[\"re:"),
    (changed(CHANNEL_CONFIG, f"{GROUP}.output_activations", {"num_bits": 8}), "output_activations"),
]


@pytest.mark.parametrize(("quantization", "message"), REFUSED)
def test_other_quantisations_are_refused_by_name(quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = bf16_directory("llama", tmp_path)
    write(path, load_file(path / "model.safetensors"), quantization)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert "config.json" in str(caught.value)


def edited(path: Path, edit: Callable[[dict[str, torch.Tensor]], object], quantization: dict[str, Any] | None) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    return write(path, tensors, quantization)


QKV = [f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"]
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_fp8_tensors_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    path = make_channel_checkpoint(bf16_directory("llama", tmp_path))
    config = path / "config.json"
    config.write_text(config.read_text().replace("quantization_config", "forgotten"))
    with pytest.raises(ModelError, match=r"q_proj.weight' is F8_E4M3, where torch.bfloat16 is needed"):
        load(path)


def test_a_quantised_lm_head_is_refused(tmp_path: Path) -> None:
    path = make_channel_checkpoint(bf16_directory("mistral", tmp_path))

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    with pytest.raises(ModelError, match=r"'lm_head.weight' is F8_E4M3"):
        load(edited(path, quantise, CHANNEL_CONFIG))


def test_a_layer_half_in_fp8_is_refused(tmp_path: Path) -> None:
    path = make_channel_checkpoint(bf16_directory("llama", tmp_path), keep_bf16=("k_proj",))
    with pytest.raises(ModelError, match=r"k_proj.*some are FP8 and some are not"):
        load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{DOWN}_scale_inv"), "down_proj.weight_scale_inv' is missing"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(2, 2)}), r"down_proj.weight_scale_inv' has the shape"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.full((1, 2), torch.nan)}), "NaN or infinity among.*down_proj"),
        (lambda t: t.update({"model.layers.0.mlp.down_proj.input_scale": torch.ones(1)}), "input_scale"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    path = make_block_checkpoint(bf16_directory("llama", tmp_path))
    with pytest.raises(ModelError, match=message):
        load(edited(path, edit, BLOCK_CONFIG))


def test_nan_weights_are_refused_when_they_are_made_fp8(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QKV[1]][3, 5] = torch.nan

    path = edited(bf16_directory("llama", tmp_path), spoil, None)
    with pytest.raises(ModelError, match=r"NaN or infinity among the weights or scales of .*k_proj"):
        load(path, "fp8")


def test_experts_in_fp8_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="FP8 is served for dense models only, this one has experts"):
        load(bf16_directory("qwen3_moe", tmp_path), "fp8")
