"""The weights of a GGUF file, under Hugging Face names."""

from __future__ import annotations

from cluster.engine.models.config import Architecture, ModelConfig
from cluster.engine.models.config_gguf import EMBEDDING, LM_HEAD, ROPE_DIVISORS
from cluster.engine.models.expert_names import ExpertPart, expert_name, router_name
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
_ROUTER = "ffn_gate_inp"
_EXPERTS = {"ffn_gate_exps": ExpertPart.GATE, "ffn_up_exps": ExpertPart.UP, "ffn_down_exps": ExpertPart.DOWN}
_ROTATED = ("attn_q", "attn_k")  # permuted by llama.cpp's converter, where it calls the architecture llama
_PERMUTED = (Architecture.LLAMA, Architecture.MIXTRAL)


def open_gguf_weights(header: GGUFHeader, config: ModelConfig) -> WeightSource:
    """Map the file. Raises `ModelError` naming a tensor of a quantisation that cannot be loaded."""
    wanted = [tensor for name, tensor in header.tensors.items() if name != ROPE_DIVISORS]
    row_bytes = {tensor.name: _row_bytes(tensor, header) for tensor in wanted}
    file = MappedFile(header.path)
    tensors: dict[str, StoredTensor] = {}
    for tensor in wanted:
        stored = StoredTensor(
            file=file,
            shape=tensor.shape,
            encoding=tensor.encoding(header.path).name,
            offset=tensor.offset,
            row_bytes=row_bytes[tensor.name],
            interleaved_head_size=config.head_size if _is_interleaved(tensor, config) else 0,
        )
        tensors |= _under_huggingface_names(tensor.name, stored, config)
    return WeightSource(header.path, (file,), tensors)


def _row_bytes(tensor: GGUFTensor, header: GGUFHeader) -> int:
    """Bytes of a matrix row, or of one element of a vector."""
    if len(tensor.shape) > 1:
        return tensor.row_bytes(header.path)
    encoding = tensor.encoding(header.path)
    if encoding.block_elements > 1:
        raise ModelError(f"{header.path}: the vector {tensor.name!r} is quantised ({encoding.name}), expected F32")
    return encoding.block_bytes


def _under_huggingface_names(name: str, stored: StoredTensor, config: ModelConfig) -> dict[str, StoredTensor]:
    """One tensor, or the experts that lie in it one after the other. A name that is unknown stays as it is:
    the loader then refuses it as unused."""
    if name in _TOP_LEVEL:
        return {f"{_TOP_LEVEL[name]}.weight": stored}
    match name.split("."):
        case ["blk", layer, part, kind] if part in _IN_LAYER:
            return {f"model.layers.{layer}.{_IN_LAYER[part]}.{kind}": stored}
        case ["blk", layer, part, "weight"] if part == _ROUTER:
            return {router_name(config.architecture, f"model.layers.{layer}"): stored}
        case ["blk", layer, part, expert, "weight"] if f"{part}_exps" in _EXPERTS and expert.isdecimal():  # older files
            own = _EXPERTS[f"{part}_exps"]
            return {expert_name(config.architecture, f"model.layers.{layer}", int(expert), own): stored}
        case ["blk", layer, part, "weight"] if part in _EXPERTS and len(stored.shape) == 3:
            num_experts, *shape = stored.shape
            expert_bytes = shape[0] * stored.row_bytes
            return {
                expert_name(config.architecture, f"model.layers.{layer}", expert, _EXPERTS[part]): stored._replace(
                    shape=tuple(shape), offset=stored.offset + expert * expert_bytes
                )
                for expert in range(num_experts)
            }
        case _:
            return {name: stored}


def _is_interleaved(tensor: GGUFTensor, config: ModelConfig) -> bool:
    parts = tensor.name.split(".")
    return config.architecture in _PERMUTED and len(parts) == 4 and parts[2] in _ROTATED
