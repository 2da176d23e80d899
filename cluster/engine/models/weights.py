"""Reading weights from mapped files, a few rows at a time, under one set of names.

Names are those of Hugging Face checkpoints, whatever the file calls its tensors.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from cluster.engine.parallel.sharding import Range
from cluster.errors import ModelError

_CHUNK_ELEMENTS = 1 << 20  # decoded at once: bounds the temporary fp32 copy


class MappedFile:
    """A file mapped for reading. Whoever opened it closes it, after the last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Copy-on-write: torch and numpy want writable memory; nothing is ever written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be mapped: {error}") from error

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A view into the map; it must not outlive this object."""
        return np.frombuffer(self._map, dtype=np.uint8, count=num_bytes, offset=offset)

    def forget_pages(self) -> None:
        """Give the pages read so far back, so that they do not count as this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._map.close()


class StoredTensor(NamedTuple):
    """Where a tensor lies. `interleaved_head_size` is 0, or the head size if the rows of each head are
    stored as llama.cpp wants them for its rotary embedding: pairs (i, i + D/2) side by side."""

    file: MappedFile
    shape: tuple[int, ...]
    encoding: str  # F32, F16, BF16, F8_E4M3 or the name of a GGUF quantisation
    offset: int
    row_bytes: int
    interleaved_head_size: int = 0


class WeightSource:
    """The weights of one model. Owns the mapped files; `close` invalidates nothing already copied."""

    def __init__(self, path: Path, files: Iterable[MappedFile], tensors: dict[str, StoredTensor]) -> None:
        self.path = path
        self._files = tuple(files)
        self._tensors = tensors

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ModelError` if the tensor is missing or has another shape."""
        if name not in self._tensors:
            raise ModelError(f"{self.path}: the tensor {name!r} is missing; the file is incomplete, fetch it again")
        found = self._tensors[name].shape
        if found != shape:
            raise ModelError(
                f"{self._tensors[name].file.path}: tensor {name!r} has the shape {found}, the config needs {shape}"
            )

    def encoding(self, name: str) -> str:
        """Of the tensor's elements, as the file calls it; empty if there is no such tensor."""
        return self._tensors[name].encoding if name in self._tensors else ""

    def copy_rows(self, name: str, rows: Range, out: torch.Tensor) -> None:
        """Fill `out` (rows.length, ...) with rows of a tensor, rounded once to the dtype of `out`.

        A vector's elements count as rows. `rows` covers whole heads where heads are interleaved. FP8 values
        mean nothing without their scales: only an FP8 `out` takes them. Raises `ModelError`.
        """
        stored = self._tensors[name]
        if (stored.encoding == "F8_E4M3") != (out.dtype == torch.float8_e4m3fn):
            raise ModelError(
                f"{stored.file.path}: tensor {name!r} is {stored.encoding}, where {out.dtype} is needed; FP8 is served "
                "for the linear layers between embedding and lm_head, if config.json has a quantization_config"
            )
        row_elements = stored.shape[1] if len(stored.shape) == 2 else 1
        step = max(_CHUNK_ELEMENTS // row_elements, 1)
        head_size = stored.interleaved_head_size
        if head_size:
            step = max(step // head_size, 1) * head_size
        for start in range(rows.start, rows.stop, step):
            chunk = Range(start, min(start + step, rows.stop))
            target = out[chunk.start - rows.start : chunk.stop - rows.start]
            decoded = _decode(stored, chunk).reshape(target.shape)
            target.copy_(_undo_interleaving(decoded, head_size) if head_size else decoded)
            del decoded  # it may be a view into the map, whose pages go now
        stored.file.forget_pages()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _decode(stored: StoredTensor, rows: Range) -> torch.Tensor:
    row_bytes = stored.row_bytes
    raw = stored.file.view(stored.offset + rows.start * row_bytes, rows.length * row_bytes)
    match stored.encoding:
        case "BF16":
            return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
        case "F16":
            return torch.from_numpy(raw.view(np.float16))
        case "F8_E4M3":
            return torch.from_numpy(raw).view(torch.float8_e4m3fn)
        case "F32":
            return torch.from_numpy(raw.view(np.float32))
        case quantised:
            blocks = raw.reshape(rows.length, row_bytes)
            return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[quantised]))


def _undo_interleaving(rows_NK: torch.Tensor, head_size: int) -> torch.Tensor:
    """Row (head, i, half) of the file is row (head, half, i) of the model, i < head_size / 2."""
    rest = rows_NK.shape[1:]
    pairs = rows_NK.reshape(-1, head_size // 2, 2, *rest)
    return pairs.transpose(1, 2).reshape(rows_NK.shape)
