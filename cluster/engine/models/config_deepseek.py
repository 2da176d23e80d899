"""What DeepSeek-V2 and -V3 (R1) say in a Hugging Face `config.json` beyond what other models do."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.engine.models.config import Architecture, ExpertsConfig, LatentConfig
from cluster.engine.trigonometry import ln
from cluster.errors import ModelError
from cluster.model_files.huggingface import decode_json_file

DEEPSEEK = (Architecture.DEEPSEEK_V2, Architecture.DEEPSEEK_V3)
# How each family chooses experts: (scoring_func, the topk_methods it may name).
_CHOICES = {
    Architecture.DEEPSEEK_V2: ("softmax", ("greedy", "group_limited_greedy")),
    Architecture.DEEPSEEK_V3: ("sigmoid", ("noaux_tc",)),
}


class DeepseekFields(msgspec.Struct):
    """The fields that matter here; others are ignored."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_interleave: bool = True
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_shared_experts: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    routed_scaling_factor: float | None = None
    scoring_func: str | None = None
    topk_method: str | None = None
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool | None = None
    num_nextn_predict_layers: int = 0

    @staticmethod
    def of_file(path: Path, architecture: Architecture) -> DeepseekFields:
        """Raises `ModelError` naming the file, and the field that is missing or not supported."""
        fields = decode_json_file(path, DeepseekFields)
        if not fields.rope_interleave:
            raise ModelError(f"{path}: rope_interleave false is not supported")
        if fields.moe_layer_freq != 1:
            raise ModelError(f"{path}: moe_layer_freq {fields.moe_layer_freq} is not supported (supported: 1)")
        scoring, methods = _CHOICES[architecture]
        if fields.scoring_func not in (None, scoring):
            raise ModelError(f"{path}: scoring_func {fields.scoring_func!r} is not supported (supported: {scoring})")
        if fields.topk_method not in (None, *methods):
            known = ", ".join(methods)
            raise ModelError(f"{path}: topk_method {fields.topk_method!r} is not supported (supported: {known})")
        if architecture is Architecture.DEEPSEEK_V2 and fields.norm_topk_prob:
            raise ModelError(f"{path}: norm_topk_prob is not supported for {architecture.value}")
        if fields.num_nextn_predict_layers < 0:
            raise ModelError(f"{path}: num_nextn_predict_layers is {fields.num_nextn_predict_layers}")
        return fields

    def latent(self, score_factor: float) -> LatentConfig:
        return LatentConfig(
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            nope_size=self.qk_nope_head_dim,
            rope_size=self.qk_rope_head_dim,
            value_size=self.v_head_dim,
            score_factor=score_factor,
        )

    def experts(self, architecture: Architecture, num_layers: int, path: Path) -> ExpertsConfig | None:
        """None: all layers are dense."""
        if self.n_routed_experts is None or self.first_k_dense_replace >= num_layers:
            return None
        if self.num_experts_per_tok is None or self.moe_intermediate_size is None:
            raise ModelError(f"{path}: with n_routed_experts, num_experts_per_tok and moe_intermediate_size are needed")
        is_sigmoid = architecture is Architecture.DEEPSEEK_V3
        if is_sigmoid:  # the families' own defaults differ, so nothing is assumed
            needed = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts")
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                raise ModelError(f"{path}: {architecture.value} with n_routed_experts needs {', '.join(missing)}")
        is_grouped = is_sigmoid or self.topk_method == "group_limited_greedy"
        return ExpertsConfig(
            num_experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            ffn_size=self.moe_intermediate_size,
            renormalise=bool(self.norm_topk_prob),
            dense_layers=tuple(range(self.first_k_dense_replace)),
            scoring="sigmoid" if is_sigmoid else "softmax",
            num_groups=(self.n_group or 1) if is_grouped else 1,
            top_groups=(self.topk_group or 1) if is_grouped else 1,
            weight_scale=1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor,
            num_shared=self.n_shared_experts or 0,
        )


def yarn_factors(
    factor: float, mscale: float | None, mscale_all_dim: float | None, path: Path
) -> tuple[float | None, float]:
    """YaRN's factor on cos and sin (None: the usual one), and the factor on the softmax scale.

    As in DeepSeek's own model: mscale / mscale_all_dim, and mscale_all_dim squared, each as 0.1 m ln(factor) + 1.
    """
    if not mscale_all_dim:
        if mscale not in (None, 1.0):
            raise ModelError(f"{path}: rope scaling with mscale {mscale} and no mscale_all_dim is not supported")
        return None, 1.0
    if not mscale:
        raise ModelError(f"{path}: rope scaling with mscale_all_dim {mscale_all_dim} and no mscale is not supported")
    on_all = 0.1 * mscale_all_dim * ln(factor) + 1.0
    return (0.1 * mscale * ln(factor) + 1.0) / on_all, on_all * on_all
