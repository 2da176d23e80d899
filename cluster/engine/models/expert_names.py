"""What Hugging Face checkpoints call the tensors of a mixture of experts; `prefix` is "model.layers.7"."""

from __future__ import annotations

from enum import Enum

from cluster.engine.models.config import Architecture


class ExpertPart(str, Enum):
    """The three matrices of an expert; the value is Qwen's name of it."""

    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


_MIXTRAL = {ExpertPart.GATE: "w1", ExpertPart.UP: "w3", ExpertPart.DOWN: "w2"}


def router_name(architecture: Architecture, prefix: str) -> str:
    return f"{_block(architecture, prefix)}.gate.weight"


def expert_name(architecture: Architecture, prefix: str, expert: int, part: ExpertPart) -> str:
    own_name = _MIXTRAL[part] if architecture is Architecture.MIXTRAL else part.value
    return f"{_block(architecture, prefix)}.experts.{expert}.{own_name}.weight"


def _block(architecture: Architecture, prefix: str) -> str:
    return f"{prefix}.{'block_sparse_moe' if architecture is Architecture.MIXTRAL else 'mlp'}"
