"""What makes two workers serve the same model: digests of its config and of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from cluster.engine.models.config import ModelConfig, WeightFormat
from cluster.model_files.cache import Progress, files_sha256, no_progress
from cluster.model_files.gguf_header import GGUFHeader
from cluster.model_files.safetensors_header import SafetensorsTensor


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal for all workers that load the same files, whatever their parallel degrees."""

    config_digest: str
    weights_digest: str  # of the manifest: names, shapes, encodings, and the content of the files
    quantisation: str  # encodings in the file, e.g. "F32+Q4_1+Q8_0", computed in bf16; else as in "BF16>fp8"
    revision: str = ""  # the commit, for models fetched by Hugging Face id
    adapters: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """One hex digest over config, weights, quantisation and adapters (a revision is a name for
        the same content, so it is not part of it)."""
        parts = (self.config_digest, self.weights_digest, self.quantisation, *self.adapters)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def identity_of_gguf(
    header: GGUFHeader, config: ModelConfig, revision: str, progress: Progress = no_progress
) -> ModelIdentity:
    """Reads the whole file unless its digest is remembered."""
    manifest = [(name, tensor.shape, str(tensor.type_id)) for name, tensor in sorted(header.tensors.items())]
    encodings = {tensor.encoding(header.path).name for tensor in header.tensors.values()}
    return _identity(config, manifest, files_sha256([header.path], progress), encodings, revision)


def identity_of_safetensors(
    tensors: dict[str, SafetensorsTensor], config: ModelConfig, revision: str, progress: Progress = no_progress
) -> ModelIdentity:
    """Reads all weight files unless their digests are remembered."""
    manifest = [(name, tensor.shape, tensor.dtype) for name, tensor in sorted(tensors.items())]
    contents = files_sha256(sorted({tensor.path for tensor in tensors.values()}), progress)
    return _identity(config, manifest, contents, {tensor.dtype for tensor in tensors.values()}, revision)


def _identity(
    config: ModelConfig,
    manifest: list[tuple[str, tuple[int, ...], str]],
    contents: list[str],
    encodings: Iterable[str],
    revision: str,
) -> ModelIdentity:
    computed_in = "" if config.weight_format is WeightFormat.BF16 else f">{config.weight_format.value}"
    return ModelIdentity(
        config_digest=hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest(),
        weights_digest=hashlib.sha256(msgspec.json.encode((manifest, contents))).hexdigest(),
        quantisation="+".join(sorted(encodings)) + computed_in,
        revision=revision,
    )
