"""Reading the header of a GGUF file: metadata and where each tensor lies.

The file is untrusted: every length is checked against the bytes that are there before it is used, so
a truncated or hostile file ends in a `ModelError` that names it, never in an exception of `struct` or
in an allocation as large as an attacker likes. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from enum import Enum
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.errors import ModelError

MetadataValue = bool | int | float | str | list["MetadataValue"]
_V = TypeVar("_V", bool, int, float, str)

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]
_MAX_ARRAY_DEPTH = 2
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20


class GGUFType(Enum):
    """Tensor encodings that can be loaded: (id in the file, elements in a block, bytes of a block)."""

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    BF16 = (30, 1, 2)

    @property
    def type_id(self) -> int:
        return self.value[0]

    @property
    def block_elements(self) -> int:
        return self.value[1]

    @property
    def block_bytes(self) -> int:
        return self.value[2]


_TYPE_BY_ID = {member.type_id: member for member in GGUFType}


class GGUFTensor(msgspec.Struct, frozen=True):
    """One tensor. `shape` is row-major as in torch, (N, K) for a matrix; GGUF lists it reversed."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # of its first byte in the file

    def encoding(self, path: Path) -> GGUFType:
        """Raise `ModelError` if this version cannot load the encoding."""
        known = _TYPE_BY_ID.get(self.type_id)
        if known is None:
            loadable = ", ".join(member.name for member in GGUFType)
            raise ModelError(
                f"{path}: tensor {self.name!r} has the unsupported quantisation type {self.type_id} "
                f"(loadable: {loadable}); convert the model to one of these"
            )
        return known

    def row_bytes(self, path: Path) -> int:
        """Bytes of one row (last dimension). Raises `ModelError` if rows are not whole blocks."""
        encoding = self.encoding(path)
        if self.shape[-1] % encoding.block_elements:
            raise ModelError(
                f"{path}: tensor {self.name!r} has rows of {self.shape[-1]} elements, "
                f"{encoding.name} needs a multiple of {encoding.block_elements}"
            )
        return self.shape[-1] // encoding.block_elements * encoding.block_bytes


class GGUFHeader(msgspec.Struct, frozen=True):
    """What a GGUF file says of itself. `tensors` keeps the file's order."""

    path: Path
    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return self.require("general.architecture", str)

    def get(self, key: str, kind: type[_V], default: _V) -> _V:
        return self.require(key, kind) if key in self.metadata else default

    def require(self, key: str, kind: type[_V]) -> _V:
        """The value of `key`. Raises `ModelError` if it is missing or of another type."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: GGUF metadata lacks {key!r}")
        value = self.metadata[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.path}: GGUF metadata {key!r} is {type(value).__name__}, not {kind.__name__}")
        return value

    def require_list(self, key: str, kind: type[_V]) -> list[_V]:
        """The array `key`. Raises `ModelError` if it is missing or holds anything but `kind`."""
        values = self.metadata.get(key)
        if not isinstance(values, list):
            raise ModelError(f"{self.path}: GGUF metadata lacks the array {key!r}")
        typed = [value for value in values if isinstance(value, kind)]
        if len(typed) != len(values):
            raise ModelError(f"{self.path}: GGUF metadata {key!r} holds something else than {kind.__name__}")
        return typed


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse and check the header of `path`. The file is closed again when this returns.

    Raises `ModelError` naming the file: not a GGUF, unsupported version, truncated, malformed.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Cursor:
    """A position in the header. Every `take` checks that the bytes exist."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 4
        self.size = len(data)

    def advance(self, num_bytes: int) -> int:
        start = self.position
        if num_bytes > self.size - start:
            raise ModelError(
                f"{self.path}: truncated GGUF: the header needs {num_bytes} bytes at offset {start}, "
                f"the file has {self.size} bytes; fetch it again"
            )
        self.position = start + num_bytes
        return start

    def scalar(self, kind: struct.Struct) -> bool | int | float:
        value: bool | int | float = kind.unpack_from(self.data, self.advance(kind.size))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar(_U32))

    def u64(self) -> int:
        return int(self.scalar(_U64))

    def string(self) -> str:
        length = self.u64()
        start = self.advance(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: malformed GGUF: text at offset {start} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            return self.array(depth)
        raise ModelError(f"{self.path}: malformed GGUF: value type {kind} at offset {self.position}")

    def array(self, depth: int) -> list[MetadataValue]:
        kind = self.u32()
        count = self.u64()
        scalar = _SCALARS.get(kind)
        if scalar is None:
            self.check_count(count, 8)  # a string or an array is at least its length field
            return [self.value(kind, depth + 1) for _ in range(count)]
        self.check_count(count, scalar.size)
        start = self.advance(count * scalar.size)
        return list(struct.unpack_from(f"<{count}{scalar.format[1:]}", self.data, start))

    def check_count(self, count: int, least_bytes: int) -> None:
        """Refuse a count that cannot fit in what is left, before anything is allocated for it."""
        if count > (self.size - self.position) // least_bytes:
            raise ModelError(
                f"{self.path}: truncated or malformed GGUF: {count} entries announced at offset "
                f"{self.position}, the file has {self.size} bytes; fetch it again"
            )


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(path, data)
    version = cursor.u32()
    if version not in _VERSIONS:
        raise ModelError(f"{path}: GGUF version {version} is not supported (supported: 2 and 3, little endian)")
    num_tensors = cursor.u64()
    num_metadata = cursor.u64()
    cursor.check_count(num_metadata, 13)  # key length, value type, one byte of value
    cursor.check_count(num_tensors, 24)  # name length, number of dimensions, type, offset
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_metadata):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
        raise ModelError(f"{path}: malformed GGUF: alignment {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for entry in entries:
        tensor = msgspec.structs.replace(entry, offset=entry.offset + data_start)
        _check_inside(path, tensor, len(data))
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            raise ModelError(f"{path}: malformed GGUF: tensor {tensor.name!r} is listed twice")
    return GGUFHeader(path=path, version=version, metadata=metadata, tensors=tensors)


def _tensor_entry(cursor: _Cursor) -> GGUFTensor:
    name = cursor.string()
    num_dimensions = cursor.u32()
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ModelError(f"{cursor.path}: malformed GGUF: tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.u64() for _ in range(num_dimensions)]))
    if 0 in shape:
        raise ModelError(f"{cursor.path}: malformed GGUF: tensor {name!r} has the shape {shape}")
    return GGUFTensor(name=name, shape=shape, type_id=cursor.u32(), offset=cursor.u64())


def _check_inside(path: Path, tensor: GGUFTensor, file_bytes: int) -> None:
    """An encoding this version does not know has no known size; it is refused when it is loaded."""
    if tensor.type_id not in _TYPE_BY_ID:
        return
    num_bytes = tensor.row_bytes(path)
    for extent in tensor.shape[:-1]:
        num_bytes *= extent
    if tensor.offset + num_bytes > file_bytes:
        raise ModelError(
            f"{path}: truncated GGUF: tensor {tensor.name!r} ends at byte {tensor.offset + num_bytes}, "
            f"the file has {file_bytes} bytes; fetch it again"
        )
