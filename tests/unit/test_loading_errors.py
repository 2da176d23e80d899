"""Models that cannot be loaded: each error names the file, the tensor or field, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from cluster.engine.kernels import get_ops
from cluster.engine.models.loader import LoadedModel, load_model
from cluster.engine.parallel.group import SingleRank
from cluster.errors import ModelError
from cluster.model_files.safetensors_header import read_safetensors_header
from tests.unit.model_factory import random_model, save_gguf, save_safetensors


def load(path: Path) -> LoadedModel:
    return load_model(path, get_ops("cpu", 1), SingleRank(), torch.device("cpu"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_safetensors(random_model("qwen2"), tmp_path / "model")


def edit_tensors(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model: the tensor 'model.layers.1.mlp.up_proj.weight' is missing"):
        load(directory)


def test_wrong_shape(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(95)}))
    with pytest.raises(ModelError, match=r"'model.norm.weight' has the shape \(95,\), the config needs \(96,\)"):
        load(directory)


def test_a_tensor_this_decoder_would_ignore_is_refused(directory: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.ones(96)}))
    with pytest.raises(ModelError, match=r"1 tensors are not part of the qwen2 architecture .*o_proj.bias"):
        load(directory)


def test_unsupported_dtype(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(96, dtype=torch.float64)}))
    with pytest.raises(ModelError, match=r"'model.norm.weight' has the unsupported dtype F64"):
        load(directory)


def test_truncated_safetensors(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 5, 200, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"model.safetensors: .*truncated"):
            load(directory)


def test_malformed_safetensors_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes((9).to_bytes(8, "little") + b'{"a": [1}' + b"\0" * 9)
    with pytest.raises(ModelError, match=r"malformed safetensors header"):
        load(directory)


def test_an_index_cannot_point_outside_of_its_directory(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(ModelError, match=r"'../elsewhere' is not the name of a file beside it"):
        load(directory)


def test_an_index_beside_another_model_is_refused(directory: Path) -> None:
    """A model that was written over a sharded one: either could be meant."""
    shard = directory / "model-00001-of-00001.safetensors"
    shard.write_bytes((directory / "model.safetensors").read_bytes())
    names = list(read_safetensors_header(shard))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    with pytest.raises(ModelError, match=r"has model\.safetensors, and model\.safetensors\.index\.json of other files"):
        load(directory)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name) | {names[0]: "model.safetensors"}}))
    with pytest.raises(ModelError, match=r"the tensor '.*' is in another file of model\.safetensors\.index\.json"):
        load(directory)
    shard.unlink()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    load(directory)


def test_json_without_end_is_named(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(directory)


def test_an_index_that_lists_a_missing_file(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    with pytest.raises(ModelError, match=r"absent.safetensors: missing"):
        load(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
        ({"hidden_size": "96"}, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"num_hidden_layers": -2}, "num_layers is -2"),
        ({"num_key_value_heads": 4}, "6 heads are not a multiple of 4 KV heads"),
        ({"num_attention_heads": 0}, "must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq' is not supported"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types 'linear_attention' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "rope scaling factor is 0.0"),
        ({"eos_token_id": 100_000}, "special token id 100000 is outside"),
    ],
)
def test_unsupported_or_senseless_config(directory: Path, changes: dict[str, Any], words: str) -> None:
    (directory / "generation_config.json").unlink()
    edit_config(directory, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        load(directory)
    assert "config.json" in caught.value.message


def test_missing_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config.json: missing"):
        load(directory)


def test_truncated_gguf(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ModelError, match=r"tiny.gguf: truncated GGUF: tensor 'blk.1"):
        load(path)


def patched_gguf(path: Path, old: bytes, new: bytes) -> Path:
    """A file with one piece of its metadata changed to another of the same length."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def test_gguf_of_an_unsupported_architecture(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    with pytest.raises(ModelError, match=r"architecture 'gemma' is not supported"):
        load(patched_gguf(path, b"llama", b"gemma"))


def test_gguf_without_a_tensor(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.down_proj.weight' is missing"):
        load(patched_gguf(path, b"blk.1.ffn_down", b"blk.1.ffn_sown"))


def test_gguf_of_an_unsupported_quantisation(tmp_path: Path) -> None:
    writer_kind = GGMLQuantizationType.TQ1_0  # 256 elements a block, like the hidden size here
    model = random_model("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)
    path = save_gguf(model, tmp_path / "tiny.gguf", writer_kind)
    with pytest.raises(ModelError, match=r"unsupported quantisation type 34 .*loadable: F32, F16"):
        load(path)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"])
def test_every_listed_quantisation_is_decoded_like_the_gguf_package_does(kind: str, tmp_path: Path) -> None:
    """gguf can decode these but not write all of them: random blocks, decoded row by row and at once."""
    from cluster.engine.models.weights import MappedFile, StoredTensor, WeightSource
    from cluster.engine.parallel.sharding import Range

    quantisation = GGMLQuantizationType[kind]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    blocks = torch.randint(0, 100, (6, 2 * block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    path = tmp_path / "raw"
    path.write_bytes(b"....." + blocks.numpy().tobytes())
    stored = StoredTensor(MappedFile(path), (6, 2 * block_elements), kind, 5, 2 * block_bytes)
    source = WeightSource(path, (stored.file,), {"t": stored})
    out = torch.empty(4, 2 * block_elements)
    source.copy_rows("t", Range(1, 5), out)
    source.close()
    assert torch.equal(out, torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), quantisation))[1:5])
