"""log and exp out of single IEEE operations, so that every element has the same bits wherever it lies.

A library's vectorised `log` or `exp` may treat the tail of a vector, or another device, differently in
the last bit. These use fp32 multiplication, addition and integer shifts alone, each rounded once as
IEEE 754 demands: they agree between vector positions, thread counts, CPU and GPU. Formulas: Cephes
`logf` and `expf` (S. Moshier), within 2 ulp. Both work in place on buffers of their own.
"""

from __future__ import annotations

import torch

SQRT_HALF_MANTISSA = 0x3504F3  # sqrt(2) has this mantissa: above it the exponent is rounded up
LN2_HIGH = 0.693359375  # ln 2 = high + low; high has few bits, so n * high is exact
LN2_LOW = -2.12194440e-4
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal fp32 numbers, elementwise."""
    bits = x.view(torch.int32)
    mantissa = bits & 0x7FFFFF
    is_upper = (mantissa > SQRT_HALF_MANTISSA).to(torch.int32)
    exponent = ((bits >> 23) - 127 + is_upper).to(torch.float32)
    # The significand moved into [sqrt(1/2), sqrt(2)), minus 1.
    f = (mantissa | ((127 - is_upper) << 23)).view(torch.float32) - 1.0
    square = f * f
    y = _horner(f, LOG_COEFFICIENTS)
    y.mul_(f).mul_(square)
    y.add_(exponent * LN2_LOW)
    y.sub_(square.mul_(0.5))
    y.add_(f)
    return y.add_(exponent.mul_(LN2_HIGH))


def exp_of_nonpositive(x: torch.Tensor) -> torch.Tensor:
    """exp of fp32 numbers <= 0, elementwise; everything below -87 counts as -87 (1.6e-38)."""
    clamped = x.clamp(min=-87.0)
    power = torch.floor((clamped * 1.44269504088896341).add_(0.5))
    reduced = clamped.sub_(power * LN2_HIGH).sub_(power * LN2_LOW)
    y = _horner(reduced, _EXP_COEFFICIENTS)
    y.mul_(reduced).mul_(reduced).add_(reduced).add_(1.0)
    scale = (power.to(torch.int32).add_(127) << 23).view(torch.float32)
    return y.mul_(scale)


def _horner(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    y = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        y.add_(coefficient).mul_(x)
    return y.add_(coefficients[-1])
