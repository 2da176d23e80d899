"""What a decoder looks like: parsed from a Hugging Face `config.json` or from GGUF metadata. No torch.

Whatever would change the output and is not implemented is refused here, by name.
"""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Literal

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
    DEEPSEEK_V2 = "deepseek_v2"
    DEEPSEEK_V3 = "deepseek_v3"


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
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: with a bias per expert that only affects the choice
    num_groups: int = 1  # equal parts of the experts, of which a token uses the best `top_groups`
    top_groups: int = 1
    weight_scale: float = 1.0  # factor on the weights
    num_shared: int = 0  # experts that every token uses: one network of `num_shared * ffn_size`


class LatentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Multi-head latent attention: a token's keys and values of all heads come from one row of
    `kv_lora_rank` numbers and `rope_size` rotated ones, which is what the cache holds."""

    q_lora_rank: int | None  # None: queries are made of the hidden state directly
    kv_lora_rank: int
    nope_size: int  # of a query head, the part without rotary embedding
    rope_size: int
    value_size: int  # of a value head
    score_factor: float = 1.0  # on the softmax scale (YaRN's mscale, squared)

    @property
    def row_size(self) -> int:
        """Numbers that the cache holds of a token in a layer."""
        return self.kv_lora_rank + self.rope_size


class SlidingWindow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of some or all layers sees its last keys only (`Ops.attention`)."""

    size: int  # keys, the row's own included
    full_layers: tuple[int, ...] = ()  # ascending indices of the layers that see all keys


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shapes and constants of one decoder. Equal configs compute the same function of the
    weights, so its digest is part of the model identity.

    With latent attention `head_size` is that of a query and `num_kv_heads` is 1: the row that all heads share.
    """

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
    latent: LatentConfig | None = None  # None: K and V are cached per head
    num_prediction_layers: int = 0  # of the checkpoint, behind the last layer, to draft tokens with: not used
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
        factor = 1.0 if self.latent is None else self.latent.score_factor
        return factor / math.sqrt(self.head_size)

    @property
    def rope_size(self) -> int:
        """Of a head, how many dimensions are rotated."""
        return self.head_size if self.latent is None else self.latent.rope_size

    @property
    def value_size(self) -> int:
        """Of a head of the attention's result."""
        return self.head_size if self.latent is None else self.latent.value_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in bf16, a tied embedding counted once."""
        layers = self.num_layers * (self._attention_weights + 2 * self.hidden_size)
        for index in range(self.num_layers):
            experts = self.experts_of_layer(index)
            if experts is None:
                layers += 3 * self.hidden_size * self.ffn_size
            else:
                layers += experts.num_experts * self.hidden_size * (3 * experts.ffn_size + 1)
                layers += 3 * experts.num_shared * experts.ffn_size * self.hidden_size
                layers += experts.num_experts if experts.scoring == "sigmoid" else 0
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return 2 * (layers + tables + self.hidden_size)

    @property
    def _attention_weights(self) -> int:
        latent, hidden = self.latent, self.hidden_size
        if latent is None:
            return hidden * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        queries = self.num_heads * self.head_size
        rank = latent.q_lora_rank
        into_queries = hidden * queries if rank is None else rank * (hidden + 1 + queries)
        into_cache = hidden * latent.row_size + latent.kv_lora_rank
        out_of_cache = latent.kv_lora_rank * self.num_heads * (latent.nope_size + latent.value_size)
        return into_queries + into_cache + out_of_cache + hidden * self.num_heads * latent.value_size


def check_config(config: ModelConfig, path: Path) -> ModelConfig:
    """Return `config`, or raise `ModelError` naming the file and the field that makes no sense."""
    for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size"):
        extent = getattr(config, field)
        if not 0 < extent <= _MAX_EXTENT:
            raise ModelError(f"{path}: {field} is {extent}")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(f"{path}: {config.num_heads} heads are not a multiple of {config.num_kv_heads} KV heads")
    if config.rope_size % 2:
        raise ModelError(f"{path}: head_size {config.rope_size} is odd, rotary embedding needs pairs")
    _check_latent(config, path)
    _check_experts(config, path)
    if config.max_position <= 0:
        raise ModelError(f"{path}: the context length is {config.max_position}")
    if not (config.rope_theta > 0.0 and config.rms_norm_eps > 0.0):
        raise ModelError(f"{path}: rope_theta {config.rope_theta} and rms_norm_eps {config.rms_norm_eps} must be > 0")
    scaling = config.rope_scaling
    if isinstance(scaling, DivisorScaling) and len(scaling.divisors) != config.rope_size // 2:
        raise ModelError(f"{path}: {len(scaling.divisors)} rope divisors for a head size of {config.rope_size}")
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
    if experts.num_groups <= 0 or experts.num_experts % experts.num_groups:
        raise ModelError(f"{path}: {experts.num_experts} experts do not divide into {experts.num_groups} groups")
    group_size = experts.num_experts // experts.num_groups
    if not 0 < experts.top_groups <= experts.num_groups or experts.top_groups * group_size < experts.top_k:
        raise ModelError(
            f"{path}: {experts.top_groups} of {experts.num_groups} groups of {group_size} experts make no sense for "
            f"{experts.top_k} experts per token"
        )
    if experts.num_shared < 0 or not experts.weight_scale > 0.0:
        raise ModelError(f"{path}: {experts.num_shared} shared experts and a weight of {experts.weight_scale}")


def _check_latent(config: ModelConfig, path: Path) -> None:
    latent = config.latent
    if latent is None:
        return
    for field in ("kv_lora_rank", "nope_size", "rope_size", "value_size"):
        if not 0 < getattr(latent, field) <= _MAX_EXTENT:
            raise ModelError(f"{path}: latent attention with {field} {getattr(latent, field)}")
    if latent.q_lora_rank is not None and not 0 < latent.q_lora_rank <= _MAX_EXTENT:
        raise ModelError(f"{path}: q_lora_rank is {latent.q_lora_rank}")
    if not latent.score_factor > 0.0:
        raise ModelError(f"{path}: the softmax scale has the factor {latent.score_factor}")
