"""`quantization_config` of a Hugging Face `config.json` -> the weight format, or a refusal by name.

Two layouts of FP8 (e4m3 weights, activations quantised as they come) are served:

    quant_method fp8                 `X.weight_scale_inv`, one scale per 128 x 128 block   (DeepSeek, Qwen3)
    quant_method compressed-tensors  `X.weight_scale`, one scale per output row            (llm-compressor)

Which layers a checkpoint left in bf16 is read from the tensors themselves, not from its list of modules.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.engine.models.config import WeightFormat
from cluster.errors import ModelError


class _Args(msgspec.Struct):
    """How compressed-tensors quantises weights or activations."""

    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True
    dynamic: bool | str = False


class _Group(msgspec.Struct):
    targets: list[str] = []
    weights: _Args | None = None
    input_activations: _Args | None = None
    output_activations: _Args | None = None
    format: str | None = None


class QuantizationConfig(msgspec.Struct):
    """The fields that matter here; others are ignored, as transformers does."""

    quant_method: str = "unnamed"
    # fp8
    fmt: str | None = None
    activation_scheme: str = "dynamic"
    weight_block_size: list[int] | None = None
    scale_fmt: str | None = None
    # compressed-tensors
    format: str | None = None
    config_groups: dict[str, _Group] = {}
    kv_cache_scheme: dict[str, object] | None = None


def weight_format_of(quantization: QuantizationConfig | None, path: Path) -> WeightFormat:
    """The format of the linear layers of a checkpoint. Raises `ModelError` naming file, field and value."""
    if quantization is None:
        return WeightFormat.BF16
    match quantization.quant_method:
        case "fp8":
            _check_fp8(quantization, path)
            return WeightFormat.FP8_BLOCK
        case "compressed-tensors":
            _check_compressed_tensors(quantization, path)
            return WeightFormat.FP8
        case other:
            raise ModelError(
                f"{path}: quantization_config {other!r} is not supported; use FP8 (quant_method fp8 or "
                "compressed-tensors), bf16 safetensors or GGUF"
            )


def _check_fp8(quantization: QuantizationConfig, path: Path) -> None:
    _expect(path, "weight_block_size", quantization.weight_block_size, [128, 128])
    _expect(path, "activation_scheme", quantization.activation_scheme, "dynamic")
    _expect(path, "fmt", quantization.fmt or "e4m3", "e4m3")
    _expect(path, "scale_fmt", quantization.scale_fmt or "float", "float")


def _check_compressed_tensors(quantization: QuantizationConfig, path: Path) -> None:
    _expect(path, "format", quantization.format, "float-quantized")
    if quantization.kv_cache_scheme is not None:
        raise ModelError(f"{path}: quantization_config.kv_cache_scheme is not supported, the KV cache is bf16")
    if not quantization.config_groups:
        raise ModelError(f"{path}: quantization_config.config_groups is empty")
    for name, group in quantization.config_groups.items():
        prefix = f"config_groups.{name}"
        _expect(path, f"{prefix}.format", group.format or "float-quantized", "float-quantized")
        _expect(path, f"{prefix}.targets", group.targets, ["Linear"])
        _expect(path, f"{prefix}.output_activations", group.output_activations, None)
        weights, inputs = group.weights or _Args(), group.input_activations or _Args()
        for part, found, strategy, is_dynamic in (
            ("weights", weights, "channel", False),
            ("input_activations", inputs, "token", True),
        ):
            _expect(path, f"{prefix}.{part}.type", found.type, "float")
            _expect(path, f"{prefix}.{part}.num_bits", found.num_bits, 8)
            _expect(path, f"{prefix}.{part}.symmetric", found.symmetric, True)
            _expect(path, f"{prefix}.{part}.strategy", found.strategy, strategy)
            _expect(path, f"{prefix}.{part}.dynamic", found.dynamic, is_dynamic)


def _expect(path: Path, field: str, found: object, expected: object) -> None:
    if found != expected:
        raise ModelError(
            f"{path}: quantization_config.{field} is {_text(found)}, only {_text(expected)} is supported"
        )  # fmt: skip


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
