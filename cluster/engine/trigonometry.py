"""cos, sin, powers and logarithms in double precision that have the same bits on every processor.

A library's own differ in the last bit between vendors, vector widths and C libraries (MKL's cosine, SLEEF's power), and
what is rounded to fp32 afterwards shows it now and then. cos and sin are single IEEE operations, each rounded once:
addition, multiplication and rounding to an integer. Their polynomials are fdlibm's (Sun Microsystems, 1993); they are
within 2**-52 of the truth, which is far less than fp32 can tell. The others are decimal arithmetic.
"""

from __future__ import annotations

import decimal

import torch

_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
# pi / 2 in parts of 27 bits and a rest: whole multiples of the parts are exact below 2**26.
_HALF_PI = tuple(map(float.fromhex, ("0x1.921fb54p+0", "0x1.10b461p-30", "0x1.a62633145c06ep-58")))
LARGEST_ANGLE = float(1 << 26)
_SIN = (  # of r, highest power first: r + r**3 * (...)
    *(1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06),
    *(-1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01),
)
_COS = (  # 1 - r**2 / 2 + r**4 * (...)
    *(-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07),
    *(2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02),
)
_DIGITS = 40  # of a power or a logarithm before it is rounded


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of fp64 radians, 0 <= angle < `LARGEST_ANGLE`, elementwise, in fp64."""
    quarters = torch.floor(angles * _TWO_OVER_PI + 0.5)
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarters * part
    square = rest * rest
    sin = rest + rest * square * _horner(square, _SIN)
    half = square * 0.5
    near_one = 1.0 - half
    cos = near_one + (((1.0 - near_one) - half) + square * square * _horner(square, _COS))
    quarter = quarters.to(torch.int64) & 3
    is_odd = quarter & 1 == 1
    turned_cos, turned_sin = torch.where(is_odd, sin, cos), torch.where(is_odd, cos, sin)
    return (
        torch.where((quarter == 1) | (quarter == 2), -turned_cos, turned_cos),
        torch.where(quarter >= 2, -turned_sin, turned_sin),
    )


def ln(value: float) -> float:
    """Natural logarithm, correctly rounded but for one case in 2**80."""
    return float(decimal.Context(prec=_DIGITS).ln(decimal.Decimal(value)))


def powers(base: float, exponents: list[tuple[int, int]]) -> torch.Tensor:
    """`base` to each exponent, given as a fraction: fp64, correctly rounded but for one case in 2**80."""
    context = decimal.Context(prec=_DIGITS)
    found = [
        context.power(decimal.Decimal(base), context.divide(decimal.Decimal(above), decimal.Decimal(below)))
        for above, below in exponents
    ]
    return torch.tensor([float(value) for value in found], dtype=torch.float64)


def _horner(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    y = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        y = (y + coefficient) * x
    return y + coefficients[-1]
