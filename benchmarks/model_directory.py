"""A model directory with random weights and a tokenizer, for benchmarks of a whole deployment.

Nothing is downloaded: weights are seeded and normal, the tokenizer knows the words of `cluster bench` and
fills its vocabulary up with tokens that no text produces.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import tokenizers
import torch
from safetensors.torch import save_file

from cluster.bench.prompts import WORDS
from cluster.engine.models.config import Llama3Scaling, ModelConfig


def write_llama_directory(
    directory: Path, config: ModelConfig, *, device: str = "cpu", seed: int = 1, std: float = 0.02
) -> Path:
    """A dense Llama of that shape as Hugging Face stores it, one file per layer. Made on `device`."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _huggingface_config(config))
    _write_tokenizer(directory, config)
    generator = torch.Generator(device=device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
        return made.normal_(0.0, std, generator=generator).cpu()

    hidden, heads, kv = config.hidden_size, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": matrix(config.vocab_size, hidden),
        "lm_head.weight": matrix(config.vocab_size, hidden),
        "model.norm.weight": ones,
    }
    files = {"ends.safetensors": ends}
    index: dict[str, str] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        files[f"layer-{layer:03}.safetensors"] = {
            f"{prefix}input_layernorm.weight": ones.clone(),
            f"{prefix}post_attention_layernorm.weight": ones.clone(),
            f"{prefix}self_attn.q_proj.weight": matrix(heads, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(kv, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(kv, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, heads),
            f"{prefix}mlp.gate_proj.weight": matrix(config.ffn_size, hidden),
            f"{prefix}mlp.up_proj.weight": matrix(config.ffn_size, hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, config.ffn_size),
        }
        _flush(directory, files, index)
    _flush(directory, files, index)
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return directory


def _flush(directory: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str]) -> None:
    for name, tensors in files.items():
        save_file(tensors, str(directory / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    files.clear()


def _huggingface_config(config: ModelConfig) -> dict[str, object]:
    scaling = None
    if isinstance(config.rope_scaling, Llama3Scaling):
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }


def _write_tokenizer(directory: Path, config: ModelConfig) -> None:
    """Byte-level BPE in which each word of the benchmark behind a space is one token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=min(4096, config.vocab_size),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" " + " ".join(WORDS)] * 4, trainer)
    document = json.loads(backend.to_str())
    vocabulary = document["model"]["vocab"]
    for number in range(len(vocabulary), config.vocab_size):
        vocabulary[f"<unused-{number}>"] = number
    (directory / "tokenizer.json").write_text(json.dumps(document))
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_bytes(msgspec.json.encode(document))
