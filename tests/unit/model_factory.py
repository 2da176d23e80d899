"""Tiny seeded random models for tests, written by transformers (safetensors) or by gguf (GGUF)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kv_cache import KVCache
from cluster.engine.models.llama import DecoderModel

SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 160,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 32}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}
_LATENT = {
    "num_key_value_heads": 6,
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 0.9,
    },
}
LATENT_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM, {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {**_LATENT, "q_lora_rank": 40, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    ),
}
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = torch.tensor([1, 17, 300, 5, 5, 42, 118, 9, 260, 33, 7, 7, 250, 64, 199, 3, 81, 12, 310, 150])
_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GGUF_ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}  # the others are called alike


def random_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """An fp32 model whose weights are bf16 numbers, with norms and biases that are not trivial."""
    config_class, model_class, own = (FAMILIES | LATENT_FAMILIES)[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **own, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if "norm" in name else 0.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)  # transformers' 0.02 would make attention almost uniform
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_((0.1 * torch.randn_like(buffer)).bfloat16())
    return model.eval()


def save_safetensors(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.bfloat16().save_pretrained(directory, **options)
    model.float()
    return directory


def save_servable(directory: Path) -> Path:
    """A random llama with its tokenizer and a chat template: all that router and workers need."""
    model = random_model("llama")
    save_safetensors(model, directory)
    tiny_tokenizer(model.config.vocab_size).save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE without merges; three special tokens first, unused tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    tokens += [f"<unused{index}>" for index in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    return tokenizer


def save_gguf(
    model: PreTrainedModel, path: Path, encoding: GGMLQuantizationType, *, split_experts: bool = False
) -> Path:
    """As llama.cpp's converter would: matrices in `encoding`, Q and K permuted where the file says llama.
    `split_experts`: a tensor for each expert, as it did in 2023."""
    config = model.config
    architecture = _GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type in _GGUF_ARCHITECTURES:
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
        if getattr(config, "layer_types", None):
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    _add_tokenizer(writer, config.vocab_size)
    tensors = _gguf_tensors(model)
    for name, tensor in _split_experts(tensors) if split_experts else tensors:
        values = tensor.float().numpy()
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            values = values.reshape(-1, 2, head_size // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        is_plain = values.ndim == 1 or "ffn_gate_inp" in name
        kind = GGMLQuantizationType.F32 if is_plain else encoding
        data = np.ascontiguousarray(gguf.quants.quantize(values, kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers keeps gate and up of all experts in one parameter."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield _gguf_name(f"{prefix}{part}.weight"), half
        elif name.endswith("experts.down_proj"):
            yield _gguf_name(f"{name}.weight"), tensor
        else:
            yield _gguf_name(name), tensor


def _split_experts(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if tensor.ndim < 3:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            yield name.replace("_exps", f".{expert}"), matrix


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    vocabulary = tiny_tokenizer(vocab_size).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index < 3 else 5 if "unused" in token else 1 for index, token in enumerate(tokens)])
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if name in top:
        return top[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(part)]}.{kind}"


@dataclass(frozen=True, slots=True)
class Step:
    """One sequence in a KV cache of its own."""

    cache: KVCache
    metadata: AttentionMetadata


def whole_sequence(model: DecoderModel, length: int, block_size: int = 16) -> Step:
    """A step that computes `length` positions at once."""
    num_blocks = -(-length // block_size)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        context_len=torch.tensor([length], dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(length),
        positions=torch.arange(length),
        num_rows_max=length,
        context_len_max=length,
    )
    return Step(KVCache(model.kv_layout(block_size), num_blocks, torch.device("cpu")), metadata)


def logits_of(model: DecoderModel, token_ids: torch.Tensor) -> torch.Tensor:
    """(T, V) fp32 logits of all rows."""
    step = whole_sequence(model, len(token_ids))
    return model.forward(token_ids, step.metadata, step.cache)


def assert_close_to(reference: PreTrainedModel, model: DecoderModel) -> None:
    """Within what bf16 activations cost: a wrong rotation, norm or permutation is off by far more."""
    with torch.inference_mode():
        wanted = reference(TOKENS[None]).logits[0]
    error = (logits_of(model, TOKENS) - wanted).square().mean().sqrt() / wanted.std()
    assert error < 0.02
