"""Reading the headers of safetensors files: which tensor lies where. Every offset is checked.

Format: github.com/huggingface/safetensors#format (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.errors import ModelError
from cluster.model_files.huggingface import decode_json_file

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class SafetensorsTensor(msgspec.Struct, frozen=True):
    """One tensor: `offset` counts from the start of its file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def element_bytes(self) -> int:
        """Raise `ModelError` if this version cannot load the dtype."""
        known = _ELEMENT_BYTES.get(self.dtype)
        if known is None:
            loadable = ", ".join(_ELEMENT_BYTES)
            raise ModelError(
                f"{self.path}: tensor {self.name!r} has the unsupported dtype {self.dtype} (loadable: {loadable})"
            )
        return known


def read_safetensors_directory(directory: Path) -> dict[str, SafetensorsTensor]:
    """All tensors of a model directory, from its index if it has one.

    Raises `ModelError` naming the file: missing, truncated, malformed.
    """
    index_path = directory / _INDEX_NAME
    if index_path.exists():
        index = decode_json_file(index_path, _Index)
        tensors = _read_indexed(directory, index, index_path)
        if (directory / _SINGLE_NAME).exists() and _SINGLE_NAME not in index.weight_map.values():
            raise ModelError(
                f"{directory}: has {_SINGLE_NAME}, and {_INDEX_NAME} of other files: remove those that are not meant"
            )
        return tensors
    if (directory / _SINGLE_NAME).exists():
        return read_safetensors_header(directory / _SINGLE_NAME)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"{directory}: has {len(files)} safetensors files and no {_INDEX_NAME}")
    return read_safetensors_header(files[0])


def _read_indexed(directory: Path, index: _Index, index_path: Path) -> dict[str, SafetensorsTensor]:
    tensors: dict[str, SafetensorsTensor] = {}
    for file_name in sorted(set(index.weight_map.values())):
        if Path(file_name).name != file_name:
            raise ModelError(f"{index_path}: {file_name!r} is not the name of a file beside it")
        path = directory / file_name
        if not path.exists():
            raise ModelError(f"{path}: missing, but {_INDEX_NAME} lists it; fetch the model again")
        header = read_safetensors_header(path)
        if doubled := sorted(tensors.keys() & header.keys()):
            raise ModelError(f"{path}: the tensor {doubled[0]!r} is in another file of {_INDEX_NAME}, too")
        tensors |= header
    for name, file_name in index.weight_map.items():
        if name not in tensors:
            raise ModelError(f"{directory / file_name}: lacks the tensor {name!r} that {_INDEX_NAME} lists")
    return tensors


def read_safetensors_header(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of one file. Raises `ModelError` naming it: unreadable, truncated, malformed."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelError(f"{path}: not a safetensors file, or truncated ({file_bytes} bytes)")
            header = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        raw_entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw_entries.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in raw_entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: malformed safetensors header: {error}") from error
    return {name: _located(path, name, entry, 8 + header_bytes, file_bytes) for name, entry in entries.items()}


def _located(path: Path, name: str, entry: _Entry, data_start: int, file_bytes: int) -> SafetensorsTensor:
    begin, end = entry.data_offsets
    tensor = SafetensorsTensor(path, name, tuple(entry.shape), entry.dtype, data_start + begin)
    num_elements = 1
    for extent in entry.shape:
        if extent < 0:
            raise ModelError(f"{path}: tensor {name!r} has the shape {tensor.shape}")
        num_elements *= extent
    known_bytes = _ELEMENT_BYTES.get(entry.dtype)
    if begin < 0 or end < begin or (known_bytes is not None and end - begin != num_elements * known_bytes):
        raise ModelError(f"{path}: tensor {name!r} lies at {begin}..{end}, which does not fit its shape {tensor.shape}")
    if data_start + end > file_bytes:
        raise ModelError(
            f"{path}: truncated: tensor {name!r} ends at byte {data_start + end}, the file has {file_bytes} bytes; "
            "fetch it again"
        )
    return tensor
