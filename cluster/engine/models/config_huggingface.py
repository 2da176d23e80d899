"""ModelConfig from a Hugging Face `config.json` (transformers 4 and 5 spellings)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.engine.models.config import (
    Architecture,
    ExpertsConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    RopeScaling,
    YarnScaling,
    check_config,
)
from cluster.engine.models.config_deepseek import DEEPSEEK, DeepseekFields, yarn_factors
from cluster.engine.models.config_quantization import QuantizationConfig, weight_format_of
from cluster.engine.models.config_window import WindowFields, window_from_huggingface
from cluster.errors import ModelError
from cluster.model_files.huggingface import GenerationDefaults, decode_json_file


class _Rope(msgspec.Struct):
    """`rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""

    rope_theta: float | None = None
    rope_type: str | None = None
    type: str | None = None  # the older name of rope_type
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0


class _HuggingFaceConfig(msgspec.Struct):
    """The fields of config.json that matter here; others are ignored, as transformers does."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: tuple[str, ...] | None = None
    quantization_config: QuantizationConfig | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None  # Mixtral's name of it, and of transformers 5 for all
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    shared_expert_intermediate_size: int | None = None
    n_shared_experts: int | None = None
    bos_token_id: int | None = None


def config_from_directory(directory: Path) -> ModelConfig:
    """Read `config.json` (and the eos ids of `generation_config.json`) of a model directory.

    Raises `ModelError` naming the file and the field: missing, of the wrong type, unsupported.
    """
    path = directory / "config.json"
    raw = decode_json_file(path, _HuggingFaceConfig)
    architecture = _architecture(raw, path)
    _refuse_unsupported(raw, architecture, path)
    num_kv_heads = raw.num_attention_heads if raw.num_key_value_heads is None else raw.num_key_value_heads
    if min(raw.num_attention_heads, num_kv_heads) <= 0:
        raise ModelError(f"{path}: num_attention_heads and num_key_value_heads must be positive")
    rope = raw.rope_parameters or raw.rope_scaling or _Rope()
    experts, head_size, latent = _experts(raw, architecture, path), raw.head_dim, None
    num_prediction_layers = 0
    if architecture in DEEPSEEK:
        deepseek = DeepseekFields.of_file(path, architecture)
        rope, score_factor = _deepseek_rope(rope, path)
        latent = deepseek.latent(score_factor)
        num_kv_heads, head_size = 1, latent.nope_size + latent.rope_size
        experts = deepseek.experts(architecture, raw.num_hidden_layers, path)
        num_prediction_layers = deepseek.num_nextn_predict_layers
    scaling = _rope_scaling(rope, raw.max_position_embeddings, path)
    config = ModelConfig(
        architecture=architecture,
        hidden_size=raw.hidden_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size or raw.hidden_size // raw.num_attention_heads,
        ffn_size=raw.intermediate_size,
        vocab_size=raw.vocab_size,
        rope_theta=raw.rope_theta or rope.rope_theta or 10_000.0,
        rope_scaling=scaling,
        rms_norm_eps=raw.rms_norm_eps,
        tie_embeddings=raw.tie_word_embeddings,
        qkv_bias=architecture is Architecture.QWEN2,
        qk_norm=architecture in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        max_position=_max_position(raw, scaling),
        bos_token_id=raw.bos_token_id,
        eos_token_ids=GenerationDefaults.of_directory(directory).eos_token_ids,
        experts=experts,
        latent=latent,
        num_prediction_layers=num_prediction_layers,
        weight_format=weight_format_of(raw.quantization_config, path),
    )
    config = check_config(config, path)
    return msgspec.structs.replace(config, window=window_from_huggingface(_window_fields(raw), config, path))


def _architecture(raw: _HuggingFaceConfig, path: Path) -> Architecture:
    try:
        return Architecture(raw.model_type)
    except ValueError:
        known = ", ".join(member.value for member in Architecture)
        raise ModelError(f"{path}: model_type {raw.model_type!r} is not supported (supported: {known})") from None


def _refuse_unsupported(raw: _HuggingFaceConfig, architecture: Architecture, path: Path) -> None:
    if raw.hidden_act != "silu":
        raise ModelError(f"{path}: hidden_act {raw.hidden_act!r} is not supported (supported: silu)")
    if raw.attention_bias and architecture is not Architecture.QWEN2:
        raise ModelError(f"{path}: attention_bias is not supported for {architecture.value}")
    if raw.mlp_bias:
        raise ModelError(f"{path}: mlp_bias is not supported")
    rotary_factors = [raw.partial_rotary_factor]
    rotary_factors += [rope.partial_rotary_factor for rope in (raw.rope_parameters, raw.rope_scaling) if rope]
    if any(factor != 1.0 for factor in rotary_factors):
        raise ModelError(f"{path}: partial_rotary_factor is not supported")
    for field in ("shared_expert_intermediate_size", "n_shared_experts"):
        if getattr(raw, field) and architecture not in DEEPSEEK:
            raise ModelError(f"{path}: shared experts ({field}) are not supported")


def _window_fields(raw: _HuggingFaceConfig) -> WindowFields:
    return WindowFields(
        sliding_window=raw.sliding_window,
        use_sliding_window=raw.use_sliding_window,
        max_window_layers=raw.max_window_layers,
        layer_types=raw.layer_types,
    )


def _experts(raw: _HuggingFaceConfig, architecture: Architecture, path: Path) -> ExpertsConfig | None:
    if architecture not in (Architecture.MIXTRAL, Architecture.QWEN3_MOE):
        return None
    num_experts = raw.num_local_experts if raw.num_experts is None else raw.num_experts
    ffn_size = raw.intermediate_size if architecture is Architecture.MIXTRAL else raw.moe_intermediate_size
    if num_experts is None or raw.num_experts_per_tok is None or ffn_size is None:
        raise ModelError(
            f"{path}: num_experts (or num_local_experts), num_experts_per_tok and, but for Mixtral, "
            "moe_intermediate_size are needed"
        )
    if raw.decoder_sparse_step <= 0:
        raise ModelError(f"{path}: decoder_sparse_step is {raw.decoder_sparse_step}, expected 1 or more")
    listed = raw.mlp_only_layers or ()
    dense = [i for i in range(raw.num_hidden_layers) if i in listed or (i + 1) % raw.decoder_sparse_step]
    return ExpertsConfig(
        num_experts=num_experts,
        top_k=raw.num_experts_per_tok,
        ffn_size=ffn_size,
        renormalise=architecture is Architecture.MIXTRAL or raw.norm_topk_prob,
        dense_layers=tuple(dense),
    )


def _deepseek_rope(rope: _Rope, path: Path) -> tuple[_Rope, float]:
    """The rope with YaRN's mscale made a factor on cos and sin, and the factor on the softmax scale."""
    if (rope.rope_type or rope.type) != "yarn":
        return rope, 1.0
    on_rope, on_scores = yarn_factors(_factor(rope, path), rope.mscale, rope.mscale_all_dim, path)
    given = on_rope if rope.attention_factor is None else rope.attention_factor
    return msgspec.structs.replace(rope, attention_factor=given, mscale=None, mscale_all_dim=None), on_scores


def _rope_scaling(rope: _Rope, max_position: int, path: Path) -> RopeScaling:
    match rope.rope_type or rope.type or "default":
        case "default":
            return NoScaling()
        case "linear":
            return LinearScaling(_factor(rope, path))
        case "llama3":
            if rope.original_max_position_embeddings is None:
                raise ModelError(f"{path}: llama3 rope scaling lacks original_max_position_embeddings")
            return Llama3Scaling(
                factor=_factor(rope, path),
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
                original_max_position=rope.original_max_position_embeddings,
            )
        case "yarn" if rope.mscale is None and rope.mscale_all_dim is None and rope.truncate:
            return YarnScaling(
                factor=_factor(rope, path),
                original_max_position=rope.original_max_position_embeddings or max_position,
                beta_fast=rope.beta_fast or 32.0,
                beta_slow=rope.beta_slow or 1.0,
                attention_factor=rope.attention_factor,
            )
        case other:
            raise ModelError(
                f"{path}: rope scaling {other!r} is not supported "
                "(supported: default, linear, llama3, yarn; with mscale for DeepSeek only)"
            )


def _factor(rope: _Rope, path: Path) -> float:
    if rope.factor is None or not 1.0 <= rope.factor <= 1e4:
        raise ModelError(f"{path}: rope scaling factor is {rope.factor}, expected a number from 1 to 10000")
    return rope.factor


def _max_position(raw: _HuggingFaceConfig, scaling: RopeScaling) -> int:
    if isinstance(scaling, YarnScaling):  # configs differ in whether they list the stretched length
        return max(raw.max_position_embeddings, int(scaling.original_max_position * scaling.factor))
    return raw.max_position_embeddings
