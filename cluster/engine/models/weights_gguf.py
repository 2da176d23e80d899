"""The weights of a GGUF file, under Hugging Face names."""

from __future__ import annotations

from cluster.engine.models.config import Architecture, ModelConfig
from cluster.engine.models.config_gguf import EMBEDDING, LM_HEAD, ROPE_DIVISORS
from cluster.engine.models.weights import MappedFile, StoredTensor, WeightSource
from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFHeader, GGUFTensor

_TOP_LEVEL = {
    EMBEDDING: "model.embed_tokens",
    "output_norm.weight": "model.norm",
    LM_HEAD: "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROTATED = ("attn_q", "attn_k")  # permuted by llama.cpp's converter, for the llama architecture only


def open_gguf_weights(header: GGUFHeader, config: ModelConfig) -> WeightSource:
    """Map the file. Raises `ModelError` naming a tensor of a quantisation that cannot be loaded."""
    wanted = [tensor for name, tensor in header.tensors.items() if name != ROPE_DIVISORS]
    row_bytes = {tensor.name: _row_bytes(tensor, header) for tensor in wanted}
    file = MappedFile(header.path)
    tensors = {
        _huggingface_name(tensor.name): StoredTensor(
            file=file,
            shape=tensor.shape,
            encoding=tensor.encoding(header.path).name,
            offset=tensor.offset,
            row_bytes=row_bytes[tensor.name],
            interleaved_head_size=config.head_size if _is_interleaved(tensor, config) else 0,
        )
        for tensor in wanted
    }
    return WeightSource(header.path, (file,), tensors)


def _row_bytes(tensor: GGUFTensor, header: GGUFHeader) -> int:
    """Bytes of a matrix row, or of one element of a vector."""
    if len(tensor.shape) > 1:
        return tensor.row_bytes(header.path)
    encoding = tensor.encoding(header.path)
    if encoding.block_elements > 1:
        raise ModelError(f"{header.path}: the vector {tensor.name!r} is quantised ({encoding.name}), expected F32")
    return encoding.block_bytes


def _huggingface_name(name: str) -> str:
    """The name as it is if it is unknown: the loader then refuses it as unused."""
    if name in _TOP_LEVEL:
        return f"{_TOP_LEVEL[name]}.weight"
    match name.split("."):
        case ["blk", layer, part, kind] if part in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}"
        case _:
            return name


def _is_interleaved(tensor: GGUFTensor, config: ModelConfig) -> bool:
    parts = tensor.name.split(".")
    return config.architecture is Architecture.LLAMA and len(parts) == 4 and parts[2] in _ROTATED
