"""Writing a Hugging Face tokenizer directory from a GGUF file, for clients that want one (benchmarks)."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from cluster.model_files.gguf_header import GGUFHeader, MetadataValue, read_gguf_header
from cluster.model_files.source import SourceKind
from cluster.tokenizer.tokenizer import Tokenizer

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
)
_HUGGINGFACE_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def write_tokenizer_directory(tokenizer: Tokenizer, directory: Path) -> None:
    """Make `directory` one that `transformers.AutoTokenizer` loads: tokenizer.json, its config with the
    chat template, special_tokens_map.json and config.json. It holds no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    source = tokenizer.source
    if source.kind is SourceKind.DIRECTORY:
        for name in _COPIED:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, directory / name)
        return
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    config: dict[str, str | int | bool | None] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_token_names,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template.source
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", tokenizer.special_token_names)
    _write_json(directory / "config.json", _model_config(read_gguf_header(source.path), tokenizer))


def _model_config(header: GGUFHeader, tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Sizes that clients look up beside a tokenizer."""
    config: dict[str, MetadataValue] = {
        "model_type": header.architecture,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": list(tokenizer.eos_token_ids),
    }
    if tokenizer.bos_token_id is not None:
        config["bos_token_id"] = tokenizer.bos_token_id
    for key, name in _HUGGINGFACE_FIELDS.items():
        if (full_key := f"{header.architecture}.{key}") in header.metadata:
            config[name] = header.metadata[full_key]
    return config


def _write_json(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
