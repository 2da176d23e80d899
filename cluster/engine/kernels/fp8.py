"""FP8 (e4m3) numbers with scales: the one formula of quantisation, and how quantised rows lie in memory.

Everything here is plain torch and gives the same bits on every device; kernels are compared with it. The
canonical order of a product of such numbers is in docs/numerics.md.

Two scalings, named after what shares one fp32 scale:

    CHANNEL   activations: a whole row;          weights: a whole output row
    BLOCK     activations: 128 columns of a row; weights: 128 x 128 (checkpoints in the style of DeepSeek)

Shape legend: T rows, N output features, K input features, P = K filled up to a multiple of 128 with
zeros, G = P / 128 groups.

A quantised activation is one uint8 tensor, (T, `row_bytes`): P values, then the row's scales (one, or G),
filled up to a multiple of 128 bytes. So a row carries its scale wherever it is moved, and every row starts
at a multiple of 128 bytes.
"""

from __future__ import annotations

from enum import Enum

import torch

GROUP = 128  # input features that share a scale where scales come in blocks, and the unit of chains
CHANNEL_CHAIN = 2  # groups that the tensor core sums in one go, per channel: 1, 2 or 4. Decides bits, as GROUP does
E4M3_MAX = 448.0
_CHUNK_ELEMENTS = 1 << 24  # of a weight quantised at once: bounds the fp32 temporaries
SMALLEST_AMAX = 2.0**-100  # amax below counts as this, so that scales and their inverses are normal numbers


class Scaling(Enum):
    """What shares a scale. Part of the model identity: the two give different bits."""

    CHANNEL = "channel"
    BLOCK = "block"


def padded_features(in_features: int) -> int:
    """P of the shape legend."""
    return -(-in_features // GROUP) * GROUP


def num_scales(in_features: int, scaling: Scaling) -> int:
    """Scales of one activation row."""
    return 1 if scaling is Scaling.CHANNEL else padded_features(in_features) // GROUP


def row_bytes(in_features: int, scaling: Scaling) -> int:
    """Bytes of one quantised activation row: values, scales, padding."""
    return padded_features(in_features) + -(-4 * num_scales(in_features, scaling) // 128) * 128


def is_quantized(x: torch.Tensor) -> bool:
    """Whether an activation is rows of values and scales, as `quantize_rows` and the fused kernels give."""
    return x.dtype == torch.uint8


def split_rows(rows_TB: torch.Tensor, in_features: int, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the values (T, P) float8_e4m3fn and the scales (T, 1 or G) float32. Neither is dense."""
    assert rows_TB.shape[1] == row_bytes(in_features, scaling), "the rows were quantised for another layer"
    width = padded_features(in_features)
    scales = rows_TB[:, width : width + 4 * num_scales(in_features, scaling)]
    return rows_TB[:, :width].view(torch.float8_e4m3fn), scales.view(torch.float32)


def quantize_rows(x_TK: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """Quantise bf16 (or fp32) activations; the definition that every kernel is compared with.

    A row (a group, if BLOCK) that holds NaN or infinity gets the scale NaN and zeros as values: all its
    products are NaN, and no other row knows.
    """
    num_rows, in_features = x_TK.shape
    padded = torch.nn.functional.pad(x_TK, (0, padded_features(in_features) - in_features))
    groups_TGE = padded.view(num_rows, num_scales(in_features, scaling), -1)
    values, scales = _quantize(groups_TGE)
    rows = torch.zeros((num_rows, row_bytes(in_features, scaling)), dtype=torch.uint8, device=x_TK.device)
    value_view, scale_view = split_rows(rows, in_features, scaling)
    value_view.view(torch.uint8).copy_(values.flatten(1).view(torch.uint8))
    scale_view.copy_(scales.flatten(1))
    return rows


def quantize_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) float8_e4m3fn and (N,) float32 scales, one per output row: a shard of rows has the bits it has
    in the whole. A row with NaN or infinity gets the scale NaN."""
    rows_at_once = max(1, _CHUNK_ELEMENTS // weight_NK.shape[1])
    parts = [_quantize(rows) for rows in torch.split(weight_NK, rows_at_once)]
    return torch.cat([values for values, _ in parts]), torch.cat([scales[:, 0] for _, scales in parts])


def quantize_weight_blocks(weight_NK: torch.Tensor, rows: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) float8_e4m3fn and (N / rows, ceil(K / 128)) float32 scales; N is a multiple of `rows`."""
    out_features, in_features = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK, (0, padded_features(in_features) - in_features))
    blocks = padded.view(out_features // rows, rows, -1, GROUP).transpose(1, 2)
    values, scales = _quantize(blocks.flatten(2))
    values_NP = values.view(torch.uint8).view(blocks.shape).transpose(1, 2).reshape(padded.shape)
    return values_NP[:, :in_features].view(torch.float8_e4m3fn), scales[:, :, 0]


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Along the last axis: amax, scale = amax / 448, value = x * (448 / amax) to nearest even.

    Both divisions are correctly rounded. On a GPU torch divides by a number, or a number by a tensor, through
    a reciprocal; a tensor by a tensor it divides exactly. Hence `limit`.
    """
    x = x.float()
    # As integers the magnitudes have the order of the numbers, with NaN above infinity: no NaN is overlooked.
    amax = (x.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1, keepdim=True).view(torch.float32)
    is_finite = amax.isfinite()
    amax = torch.where(is_finite, amax, 1.0).clamp_min(SMALLEST_AMAX)
    limit = torch.full_like(amax, E4M3_MAX)
    scales = torch.where(is_finite, amax / limit, torch.nan)
    scaled = torch.where(is_finite, x * (limit / amax), 0.0)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize_weight(values_NK: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(N, K) float32: what the numbers stand for. Scales are (N,), or (N / R, G) with R rows to a scale."""
    if scales.ndim == 1:
        return values_NK.float() * scales[:, None]
    spread = scales.repeat_interleave(values_NK.shape[0] // scales.shape[0], 0).repeat_interleave(GROUP, 1)
    return values_NK.float() * spread[:, : values_NK.shape[1]]
