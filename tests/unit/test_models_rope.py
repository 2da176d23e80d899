"""Rotary tables of every scaling against transformers' own formulas, and configs of both spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cluster.engine.models.config import DivisorScaling, LinearScaling, ModelConfig, NoScaling, YarnScaling
from cluster.engine.models.config_gguf import config_from_gguf
from cluster.engine.models.config_huggingface import config_from_directory
from cluster.engine.models.rope import rope_table
from cluster.errors import ModelError
from cluster.model_files.gguf_header import read_gguf_header
from tests.unit.model_factory import SIZES

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with betas": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
}


def written_config(directory: Path, **fields: Any) -> ModelConfig:
    config = {"model_type": "llama", **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return config_from_directory(directory)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_is_transformers(name: str, tmp_path: Path) -> None:
    parameters = {"rope_theta": 50_000.0, **SCALINGS[name]}
    config = written_config(tmp_path, rope_parameters=parameters)
    reference = LlamaConfig(**SIZES, rope_parameters=parameters)
    if name == "default":
        frequencies, factor = LlamaForCausalLM(reference).model.rotary_emb.inv_freq, 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](reference, CPU)
    angles = torch.arange(256)[:, None] * frequencies
    wanted = torch.cat((angles.cos(), angles.sin()), dim=1) * factor
    torch.testing.assert_close(rope_table(config, 256, CPU), wanted, atol=1e-4, rtol=0)


def test_both_spellings_of_transformers_give_one_config(tmp_path: Path) -> None:
    older = {"rope_theta": 50_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    newer = {"rope_parameters": {"rope_theta": 50_000.0, "rope_type": "linear", "factor": 4.0}}
    assert written_config(tmp_path, **older) == written_config(tmp_path, **newer)


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    config = written_config(tmp_path, rope_parameters={"rope_theta": 1e4, **SCALINGS["yarn"]})
    assert config.max_position == 256
    longer = {**SCALINGS["yarn"], "factor": 16.0}
    assert written_config(tmp_path, rope_parameters={"rope_theta": 1e4, **longer}).max_position == 1024


def test_eos_ids_of_generation_config_come_first_and_once(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert written_config(tmp_path).eos_token_ids == (7, 2)


def gguf_config(
    path: Path, *, divisors: list[float] | None = None, scaling: str | None = None, **floats: float
) -> ModelConfig:
    """`floats`: by the end of their key, `_` for `.`."""
    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_scaling_orig_ctx_len, 64),
    ):
        add(value)
    for name, number in floats.items():
        writer.add_float32(f"llama.rope.{name.replace('scaling_', 'scaling.')}", number)
    if scaling is not None:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_tensor("token_embd.weight", torch.zeros(10, 32).numpy(), raw_dtype=GGMLQuantizationType.F32)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(divisors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config_from_gguf(read_gguf_header(path))


def test_gguf_scalings(tmp_path: Path) -> None:
    linear = gguf_config(tmp_path / "a.gguf", scaling="linear", scaling_factor=4.0)
    assert linear.rope_scaling == LinearScaling(4.0)
    yarn = gguf_config(tmp_path / "b.gguf", scaling="yarn", scaling_factor=4.0, scaling_yarn_beta_fast=32.0)
    assert yarn.rope_scaling == YarnScaling(4.0, 64)
    config = gguf_config(tmp_path / "c.gguf", divisors=[1.0, 2.0, 4.0, 8.0])
    assert config.rope_scaling == DivisorScaling((1.0, 2.0, 4.0, 8.0))
    plain = gguf_config(tmp_path / "d.gguf")
    angles = rope_table(plain, 2, CPU)[1, 4:].asin()
    divided = rope_table(config, 2, CPU)[1, 4:].asin()
    torch.testing.assert_close(divided, angles / torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_gguf_scaling_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    assert gguf_config(tmp_path / "a.gguf", scaling_factor=4.0).rope_scaling == LinearScaling(4.0)
    assert gguf_config(tmp_path / "b.gguf", scale_linear=4.0).rope_scaling == LinearScaling(4.0)
    assert gguf_config(tmp_path / "c.gguf", scaling="linear", scale_linear=2.0).rope_scaling == LinearScaling(2.0)
    for factor in (0.0, 1.0):
        assert gguf_config(tmp_path / "d.gguf", scaling_factor=factor).rope_scaling == NoScaling()
    with pytest.raises(ModelError, match=r"llama\.rope\.scaling\.yarn_beta_fast is not supported, but for 32"):
        gguf_config(tmp_path / "e.gguf", scaling="yarn", scaling_factor=4.0, scaling_yarn_beta_fast=8.0)


def test_gguf_sizes_default_as_in_llama_cpp(tmp_path: Path) -> None:
    config = gguf_config(tmp_path / "a.gguf")
    assert (config.num_kv_heads, config.head_size, config.vocab_size) == (4, 8, 10)
    assert config.rope_theta == 10_000.0
    assert config.tie_embeddings
