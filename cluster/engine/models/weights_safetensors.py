"""The weights of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from cluster.engine.models.weights import MappedFile, StoredTensor, WeightSource
from cluster.model_files.safetensors_header import SafetensorsTensor


def open_safetensors_weights(directory: Path, tensors: dict[str, SafetensorsTensor]) -> WeightSource:
    """Map the files. Raises `ModelError` naming a tensor of a dtype that cannot be loaded."""
    element_bytes = {name: tensor.element_bytes() for name, tensor in tensors.items()}
    files = {path: MappedFile(path) for path in sorted({tensor.path for tensor in tensors.values()})}
    stored = {
        name: StoredTensor(
            file=files[tensor.path],
            shape=tensor.shape,
            encoding=tensor.dtype,
            offset=tensor.offset,
            row_bytes=element_bytes[name] * (tensor.shape[1] if len(tensor.shape) == 2 else 1),
        )
        for name, tensor in tensors.items()
    }
    return WeightSource(directory, files.values(), stored)
