"""FP8 linear layers: read from a checkpoint that holds them, or made from bf16 as it is loaded.

Either way a rank gets the bits of its rows of the whole layer: scales belong to output rows, or to blocks of
128 rows that are spread to the rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cluster.engine.kernels.fp8 import GROUP, quantize_weight
from cluster.engine.models.config import WeightFormat
from cluster.engine.parallel.sharding import Range
from cluster.errors import ModelError

FP8_ENCODING = "F8_E4M3"

Copy = Callable[[str, tuple[int, ...], Range, torch.Tensor], None]  # name, shape of the whole, rows, target


class Part(NamedTuple):
    """Some rows of one tensor; a fused layer is several parts, one below the other."""

    name: str
    total_rows: int
    rows: Range


class Fp8Values(NamedTuple):
    """As `Ops.pack_fp8` takes them."""

    values_NK: torch.Tensor
    scale: torch.Tensor


def quantize_layer(weight_NK: torch.Tensor, parts: Sequence[Part], path: Path) -> Fp8Values:
    """One scale per output row. Raises `ModelError` if a weight is NaN or infinite."""
    return _checked(Fp8Values(*quantize_weight(weight_NK)), parts, path)


def read_layer(
    copy: Copy, parts: Sequence[Part], in_features: int, weight_format: WeightFormat, path: Path
) -> Fp8Values:
    """Values and scales as they are in the file. Raises `ModelError` naming a tensor that does not fit."""
    values = torch.empty((sum(part.rows.length for part in parts), in_features), dtype=torch.float8_e4m3fn)
    start = 0
    for part in parts:
        copy(part.name, (part.total_rows, in_features), part.rows, values[start : start + part.rows.length])
        start += part.rows.length
    match weight_format:
        case WeightFormat.FP8_BLOCK:
            scale = _block_scales(copy, parts, in_features)
        case _:
            scale = _row_scales(copy, parts)
    return _checked(Fp8Values(values, scale), parts, path)


def _row_scales(copy: Copy, parts: Sequence[Part]) -> torch.Tensor:
    """(N,): `X.weight_scale` is (N, 1)."""
    scale = torch.empty((sum(part.rows.length for part in parts), 1))
    start = 0
    for part in parts:
        target = scale[start : start + part.rows.length]
        copy(f"{part.name}_scale", (part.total_rows, 1), part.rows, target)
        start += part.rows.length
    return scale[:, 0]


def _block_scales(copy: Copy, parts: Sequence[Part], in_features: int) -> torch.Tensor:
    """(N / R, G), R the most rows of which no part begins or ends one in the middle: 128 unless heads are small
    or the ranks share a layer unevenly. `X.weight_scale_inv` is (blocks of 128 rows, G)."""
    granularity = GROUP
    while any(part.rows.start % granularity or part.rows.length % granularity for part in parts):
        granularity //= 2
    num_groups = -(-in_features // GROUP)
    scales = []
    for part in parts:
        blocks = Range(part.rows.start // GROUP, -(-part.rows.stop // GROUP))
        stored = torch.empty((blocks.length, num_groups))
        copy(f"{part.name}_scale_inv", (-(-part.total_rows // GROUP), num_groups), blocks, stored)
        rows = torch.arange(part.rows.start, part.rows.stop, granularity)
        scales.append(stored[rows // GROUP - blocks.start])
    return torch.cat(scales)


def _checked(layer: Fp8Values, parts: Sequence[Part], path: Path) -> Fp8Values:
    if not bool(layer.scale.isfinite().all()):
        names = ", ".join(part.name for part in parts)
        raise ModelError(f"{path}: NaN or infinity among the weights or scales of {names}")
    return layer
