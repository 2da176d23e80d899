"""FP8 checkpoints out of tiny bf16 ones, in the two layouts that are served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cluster.engine.kernels.fp8 import GROUP, quantize_weight, quantize_weight_blocks

BLOCK_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_ARGS = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNEL_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _ARGS | {"strategy": "channel", "dynamic": False},
            "input_activations": _ARGS | {"strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}


def is_layer_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def make_block_checkpoint(directory: Path, scale_dtype: torch.dtype = torch.bfloat16) -> Path:
    """Quantise the linear layers of a bf16 directory in place, 128 x 128 blocks."""
    tensors = load_file(directory / "model.safetensors")
    for name in filter(is_layer_linear, list(tensors)):
        weight_NK = tensors[name].float()
        padded = torch.nn.functional.pad(weight_NK, (0, 0, 0, -len(weight_NK) % GROUP))
        values, scale = quantize_weight_blocks(padded)
        tensors[name] = values[: len(weight_NK)].contiguous()
        tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
    return write(directory, tensors, BLOCK_CONFIG)


def make_channel_checkpoint(directory: Path, keep_bf16: tuple[str, ...] = ()) -> Path:
    """Quantise the linear layers of a bf16 directory in place, one scale per row; some layers stay as they are."""
    tensors = load_file(directory / "model.safetensors")
    for name in filter(is_layer_linear, list(tensors)):
        if not any(part in name for part in keep_bf16):
            tensors[name], scale = quantize_weight(tensors[name].float())
            tensors[f"{name}_scale"] = scale[:, None].contiguous()
    return write(directory, tensors, CHANNEL_CONFIG)


def write(directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> Path:
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | ({} if quantization is None else {"quantization_config": quantization})))
    return directory
