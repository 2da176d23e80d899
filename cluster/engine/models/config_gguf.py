"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

import struct

import msgspec

from cluster.engine.models.config import (
    Architecture,
    DivisorScaling,
    ExpertsConfig,
    LinearScaling,
    ModelConfig,
    NoScaling,
    RopeScaling,
    YarnScaling,
    check_config,
)
from cluster.engine.models.config_window import window_from_gguf
from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFHeader, GGUFType
from cluster.model_files.gguf_special_tokens import special_tokens

# Mistral files call themselves llama, with the same names and the same permutation; so do those of Mixtral.
_ARCHITECTURES = {
    "llama": Architecture.LLAMA,
    "qwen2": Architecture.QWEN2,
    "qwen3": Architecture.QWEN3,
    "qwen3moe": Architecture.QWEN3_MOE,
}
_SOFTMAX_GATING = 1
_YARN_DEFAULTS = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
EMBEDDING, LM_HEAD, ROPE_DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


def config_from_gguf(header: GGUFHeader) -> ModelConfig:
    """Raises `ModelError` naming the file and the metadata key: missing, unsupported, senseless."""
    arch = _architecture(header)
    prefix = header.architecture
    if EMBEDDING not in header.tensors:
        raise ModelError(f"{header.path}: the tensor {EMBEDDING!r} is missing")
    hidden_size = header.require(f"{prefix}.embedding_length", int)
    num_heads = header.require(f"{prefix}.attention.head_count", int)
    if num_heads <= 0:
        raise ModelError(f"{header.path}: {prefix}.attention.head_count is {num_heads}")
    head_size = header.get(f"{prefix}.attention.key_length", int, hidden_size // num_heads)
    rotary_size = header.get(f"{prefix}.rope.dimension_count", int, head_size)
    if rotary_size != head_size:
        raise ModelError(f"{header.path}: rotary embedding of {rotary_size} of {head_size} dimensions is not supported")
    special = special_tokens(header)
    config = ModelConfig(
        architecture=arch,
        hidden_size=hidden_size,
        num_layers=header.require(f"{prefix}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=header.get(f"{prefix}.attention.head_count_kv", int, num_heads),
        head_size=head_size,
        ffn_size=header.require(f"{prefix}.feed_forward_length", int),
        vocab_size=header.tensors[EMBEDDING].shape[0],
        rope_theta=header.get(f"{prefix}.rope.freq_base", float, 10_000.0),
        rope_scaling=_rope_scaling(header, prefix),
        rms_norm_eps=header.require(f"{prefix}.attention.layer_norm_rms_epsilon", float),
        tie_embeddings=LM_HEAD not in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        qk_norm=arch in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        max_position=header.require(f"{prefix}.context_length", int),
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        experts=_experts(header, arch),
    )
    config = check_config(config, header.path)
    return msgspec.structs.replace(config, window=window_from_gguf(header, config))


def _architecture(header: GGUFHeader) -> Architecture:
    architecture = _ARCHITECTURES.get(header.architecture)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(f"{header.path}: architecture {header.architecture!r} is not supported (supported: {known})")
    has_experts = header.get(f"{header.architecture}.expert_count", int, 0) > 0
    if architecture is Architecture.LLAMA and has_experts:
        return Architecture.MIXTRAL
    if has_experts != (architecture is Architecture.QWEN3_MOE):
        raise ModelError(f"{header.path}: {header.architecture}.expert_count does not fit the architecture")
    return architecture


def _experts(header: GGUFHeader, architecture: Architecture) -> ExpertsConfig | None:
    """llama.cpp renormalises the chosen probabilities of both architectures."""
    prefix = header.architecture
    if architecture not in (Architecture.MIXTRAL, Architecture.QWEN3_MOE):
        return None
    if header.get(f"{prefix}.expert_gating_func", int, _SOFTMAX_GATING) not in (0, _SOFTMAX_GATING):
        raise ModelError(f"{header.path}: {prefix}.expert_gating_func is not softmax, which is the one supported")
    if header.get(f"{prefix}.expert_weights_scale", float, 1.0) not in (0.0, 1.0):
        raise ModelError(f"{header.path}: {prefix}.expert_weights_scale is not supported")
    for key in ("expert_shared_count", "expert_shared_feed_forward_length"):
        if header.get(f"{prefix}.{key}", int, 0) > 0:
            raise ModelError(f"{header.path}: shared experts ({prefix}.{key}) are not supported")
    ffn_size = header.require(f"{prefix}.feed_forward_length", int)
    return ExpertsConfig(
        num_experts=header.require(f"{prefix}.expert_count", int),
        top_k=header.require(f"{prefix}.expert_used_count", int),
        ffn_size=header.get(f"{prefix}.expert_feed_forward_length", int, ffn_size),
        renormalise=True,
    )


def _rope_scaling(header: GGUFHeader, prefix: str) -> RopeScaling:
    # As llama.cpp reads them: an older key for the factor, 0 for none, and a factor without a type is linear.
    factor = header.get(f"{prefix}.rope.scaling.factor", float, 0.0)
    factor = factor or header.get(f"{prefix}.rope.scale_linear", float, 0.0) or 1.0
    kind = header.get(f"{prefix}.rope.scaling.type", str, "none" if factor == 1.0 else "linear")
    for key, usual in _YARN_DEFAULTS.items():
        if header.get(f"{prefix}.rope.scaling.{key}", float, usual) != usual:
            raise ModelError(f"{header.path}: {prefix}.rope.scaling.{key} is not supported, but for {usual:g}")
    if not 1.0 <= factor <= 1e4:
        raise ModelError(f"{header.path}: {prefix}.rope.scaling.factor is {factor}")
    if ROPE_DIVISORS in header.tensors:
        if kind != "none":
            raise ModelError(f"{header.path}: rope scaling {kind!r} together with {ROPE_DIVISORS!r} is not supported")
        return DivisorScaling(_read_divisors(header))
    match kind:
        case "none":
            return NoScaling()
        case "linear":
            return LinearScaling(factor)
        case "yarn":
            original = header.require(f"{prefix}.rope.scaling.original_context_length", int)
            return YarnScaling(factor=factor, original_max_position=original)
        case other:
            raise ModelError(f"{header.path}: rope scaling {other!r} is not supported (none, linear, yarn)")


def _read_divisors(header: GGUFHeader) -> tuple[float, ...]:
    tensor = header.tensors[ROPE_DIVISORS]
    if tensor.encoding(header.path) is not GGUFType.F32 or len(tensor.shape) != 1:
        raise ModelError(f"{header.path}: tensor {ROPE_DIVISORS!r} must be a vector of F32")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return struct.unpack(f"<{tensor.shape[0]}f", file.read(4 * tensor.shape[0]))
