"""What a decoder looks like: parsed from a Hugging Face `config.json` or from GGUF metadata. No torch.

Whatever would change the output and is not implemented is refused here, by name.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import msgspec

from cluster.errors import ModelError

MAX_EXPERTS = 1024
_MAX_EXTENT = 1 << 24  # no size of a real model comes near; keeps products far from overflow


class Architecture(str, Enum):
    """The families one decoder covers (`llama.py`); SmolLM2 is a Llama."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MIXTRAL = "mixtral"
    QWEN3_MOE = "qwen3_moe"


class WeightFormat(str, Enum):
    """Of the linear layers between embedding and lm_head, which stay bf16 as do the norms.

    FP8 is e4m3 with activations quantised per token. Each format has bits of its own.
    """

    BF16 = "bf16"
    FP8 = "fp8"  # one scale per output row
    FP8_BLOCK = "fp8_block"  # one scale per 128 x 128 block, activations per 128 features


class NoScaling(msgspec.Struct, frozen=True, tag="none"):
    """Plain rotary embedding."""


class LinearScaling(msgspec.Struct, frozen=True, tag="linear"):
    """Every frequency divided by `factor`."""

    factor: float


class Llama3Scaling(msgspec.Struct, frozen=True, tag="llama3"):
    """Low frequencies divided by `factor`, a smooth transition between the two wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class YarnScaling(msgspec.Struct, frozen=True, tag="yarn"):
    """YaRN (arXiv:2309.00071): interpolation by frequency, and a factor on cos and sin."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1


class DivisorScaling(msgspec.Struct, frozen=True, tag="divisors"):
    """One divisor per frequency, as GGUF files of Llama 3 carry in `rope_freqs.weight`."""

    divisors: tuple[float, ...]


RopeScaling = NoScaling | LinearScaling | Llama3Scaling | YarnScaling | DivisorScaling


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mixture of experts that stands for the feed-forward network of some or all layers."""

    num_experts: int
    top_k: int  # experts of each token
    ffn_size: int  # of one expert
    renormalise: bool  # the chosen experts' probabilities are divided by their sum
    dense_layers: tuple[int, ...] = ()  # ascending indices of the layers that have an ordinary network


class SlidingWindow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of some or all layers sees its last keys only (`Ops.attention`)."""

    size: int  # keys, the row's own included
    full_layers: tuple[int, ...] = ()  # ascending indices of the layers that see all keys


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shapes and constants of one decoder. Equal configs compute the same function of the
    weights, so its digest is part of the model identity."""

    architecture: Architecture
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int  # of layers without experts
    vocab_size: int
    rope_theta: float
    rope_scaling: RopeScaling
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position: int  # the longest context: prompt and output together
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    experts: ExpertsConfig | None = None  # None: a dense model
    weight_format: WeightFormat = WeightFormat.BF16
    window: SlidingWindow | None = None  # None: every layer sees all keys

    def window_of_layer(self, index: int) -> int | None:
        """Keys that a row of the layer sees; None: all."""
        if self.window is None or index in self.window.full_layers:
            return None
        return self.window.size

    def experts_of_layer(self, index: int) -> ExpertsConfig | None:
        """None: the layer has an ordinary feed-forward network."""
        is_dense = self.experts is None or index in self.experts.dense_layers
        return None if is_dense else self.experts

    @property
    def attention_scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in bf16, a tied embedding counted once."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        layers = self.num_layers * (attention + 2 * self.hidden_size)
        for index in range(self.num_layers):
            experts = self.experts_of_layer(index)
            if experts is None:
                layers += 3 * self.hidden_size * self.ffn_size
            else:
                layers += experts.num_experts * self.hidden_size * (3 * experts.ffn_size + 1)
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return 2 * (layers + tables + self.hidden_size)


def check_config(config: ModelConfig, path: Path) -> ModelConfig:
    """Return `config`, or raise `ModelError` naming the file and the field that makes no sense."""
    for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size"):
        extent = getattr(config, field)
        if not 0 < extent <= _MAX_EXTENT:
            raise ModelError(f"{path}: {field} is {extent}")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"{path}: {config.num_heads} heads are not a multiple of {config.num_kv_heads} KV heads")
    if config.head_size % 2:
        raise ModelError(f"{path}: head_size {config.head_size} is odd, rotary embedding needs pairs")
    _check_experts(config, path)
    if config.max_position <= 0:
        raise ModelError(f"{path}: the context length is {config.max_position}")
    if not (config.rope_theta > 0.0 and config.rms_norm_eps > 0.0):
        raise ModelError(f"{path}: rope_theta {config.rope_theta} and rms_norm_eps {config.rms_norm_eps} must be > 0")
    scaling = config.rope_scaling
    if isinstance(scaling, DivisorScaling) and len(scaling.divisors) != config.head_size // 2:
        raise ModelError(f"{path}: {len(scaling.divisors)} rope divisors for a head size of {config.head_size}")
    for token_id in (*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))):
        if not 0 <= token_id < config.vocab_size:
            raise ModelError(f"{path}: special token id {token_id} is outside of the vocabulary {config.vocab_size}")
    return config


def _check_experts(config: ModelConfig, path: Path) -> None:
    experts = config.experts
    if experts is None:
        return
    if not 0 < experts.num_experts <= MAX_EXPERTS:
        raise ModelError(f"{path}: {experts.num_experts} experts in a layer, supported are 1 to {MAX_EXPERTS}")
    if not 0 < experts.top_k <= experts.num_experts:
        raise ModelError(f"{path}: {experts.top_k} of {experts.num_experts} experts per token makes no sense")
    if not 0 < experts.ffn_size <= _MAX_EXTENT:
        raise ModelError(f"{path}: the feed-forward size of an expert is {experts.ffn_size}")
