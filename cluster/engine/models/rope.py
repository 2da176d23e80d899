"""Rotary embedding tables, for every scaling in config.py. Computed on the host in double precision, by operations that
have the same bits on every processor: workers of one deployment may be on different ones."""

from __future__ import annotations

import math

import torch

from cluster.engine.models.config import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    YarnScaling,
)
from cluster.engine.trigonometry import cos_sin, ln, powers

_ROWS = 4096  # of a table at a time: temporaries stay in the cache


def rope_table(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """(P, D) fp32: cos of each position and frequency in [:, :D/2], sin in the rest."""
    frequencies_F, factor = _frequencies(config), _attention_factor(config)
    table_PD = torch.empty((num_positions, 2 * len(frequencies_F)))
    positions_P = torch.arange(num_positions, dtype=torch.float64)
    for part_PD, part_P in zip(torch.split(table_PD, _ROWS), torch.split(positions_P, _ROWS), strict=True):
        cos_PF, sin_PF = cos_sin(part_P[:, None] * frequencies_F)
        part_PD.copy_(torch.cat((cos_PF, sin_PF), dim=1) * factor)
    return table_PD.to(device)


def _frequencies(config: ModelConfig) -> torch.Tensor:
    """(D/2,) fp64 radians per position."""
    plain = powers(config.rope_theta, [(-index, config.rope_size) for index in range(0, config.rope_size, 2)])
    match config.rope_scaling:
        case NoScaling():
            return plain
        case LinearScaling(factor):
            return plain / factor
        case DivisorScaling(divisors):
            return plain / torch.tensor(divisors, dtype=torch.float64)
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(plain, scaling, config)


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """As published with Llama 3.1: by wavelength, long ones divided, short ones kept, blended between."""
    rotations = scaling.original_max_position * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((rotations - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return plain * keep + plain / scaling.factor * (1.0 - keep)


def _yarn(plain: torch.Tensor, scaling: YarnScaling, config: ModelConfig) -> torch.Tensor:
    """NTK-by-parts, section 3.2 of arXiv:2309.00071."""

    def dimension_of(rotations: float) -> float:
        wavelength_ratio = scaling.original_max_position / (rotations * 2 * math.pi)
        return config.rope_size * ln(wavelength_ratio) / (2 * ln(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.rope_size - 1)
    indices = torch.arange(config.rope_size // 2, dtype=torch.float64)
    interpolate = ((indices - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return plain * (1.0 - interpolate) + plain / scaling.factor * interpolate


def _attention_factor(config: ModelConfig) -> float:
    match config.rope_scaling:
        case YarnScaling(attention_factor=float() as given):
            return given
        case YarnScaling(factor=factor):
            return 0.1 * ln(factor) + 1.0 if factor > 1.0 else 1.0
        case _:
            return 1.0
