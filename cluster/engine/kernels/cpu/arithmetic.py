"""The canonical arithmetic of the CPU operations, in slow torch that does one rounding at a time.

Everything here is elementwise, or a Python loop over elementwise steps in the canonical order, so no
result can depend on shapes, threads or vector positions. The native kernels are compared with it.

A *dot chain* is one fp32 accumulator per output element over ascending k. How a step rounds depends on
the instruction that does it, the *instruction class*:

    fma           acc = fma(a[k], b[k], acc) in IEEE fp32, denormals kept
    avx512_bf16   VDPBF16PS: for each pair of k, first the odd element, then the even one; every step
                  flushes denormals
    amx_bf16      TDPBF16PS: for each group of 32 k, one fma chain from zero over the even elements and
                  one over the odd ones; then acc = acc + (even + odd); every step flushes denormals
"""

from __future__ import annotations

from enum import Enum

import torch

LANES = 16  # lane chains of a row-wise sum
GROUP = 32  # K elements of one TDPBF16PS
SPLIT = 256  # keys of one attention split, counted from position 0
SMALLEST_NORMAL = 2.0**-126
_MAX_ELEMENTS = 1 << 22  # bounds the temporaries of a dot chain (float64)


class InstructionClass(str, Enum):
    """Results are equal within a class, not between classes. Ordered from slow to fast."""

    FMA = "fma"
    AVX512_BF16 = "avx512_bf16"
    AMX_BF16 = "amx_bf16"


def dot_chain(a_MK: torch.Tensor, b_NK: torch.Tensor, instructions: InstructionClass) -> torch.Tensor:
    """(M, N) fp32 dot products of bf16 rows in the canonical order of `instructions`."""
    a_MK, b_NK = _pad_columns(a_MK, GROUP), _pad_columns(b_NK, GROUP)
    num_columns = max(1, _MAX_ELEMENTS // max(1, a_MK.shape[0] * (a_MK.shape[1] // GROUP + 1)))
    chain = _CHAINS[instructions]
    a, b = a_MK.double(), b_NK.double()
    return torch.cat(
        [chain(a, part) for part in torch.split(b, num_columns)] or [a.new_empty((len(a), 0))], dim=1
    ).float()


def _chain_fma(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # A product of two bf16 values has 16 significant bits. Added to an fp32 value in float64 and then
    # rounded, it gives exactly the fp32 fma: where float64 has to round, one of the two is too small
    # to matter.
    acc = a.new_zeros((a.shape[0], b.shape[0]))
    a_columns, b_rows = a.t().contiguous(), b.t().contiguous()
    for k in range(a.shape[1]):
        acc = torch.addcmul(acc, a_columns[k, :, None], b_rows[k, None, :]).float().double()
    return acc


def _chain_avx512_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = _flush(a), _flush(b)
    a_columns, b_rows = a.t().contiguous(), b.t().contiguous()
    acc = a.new_zeros((a.shape[0], b.shape[0]))
    for pair in range(a.shape[1] // 2):
        for k in (2 * pair + 1, 2 * pair):
            acc = _round_flush(torch.addcmul(acc, a_columns[k, :, None], b_rows[k, None, :]))
    return acc


def _chain_amx_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = _groups(a)
    b = _groups(b)
    even = a.new_zeros((a.shape[0], a.shape[2], b.shape[2]))
    odd = torch.zeros_like(even)
    for k in range(0, GROUP, 2):
        even = _round_flush(torch.addcmul(even, a[:, k, :, None], b[:, k, None, :]))
        odd = _round_flush(torch.addcmul(odd, a[:, k + 1, :, None], b[:, k + 1, None, :]))
    both = _round_flush(even + odd)
    acc = torch.zeros_like(both[0]) if len(both) else a.new_zeros((a.shape[2], b.shape[2]))
    for group in both:
        acc = _round_flush(acc + group)
    return acc


def _groups(x: torch.Tensor) -> torch.Tensor:
    """Rows (R, K) -> (groups, GROUP, R), flushed."""
    return _flush(x).view(len(x), x.shape[1] // GROUP, GROUP).permute(1, 2, 0).contiguous()


_CHAINS = {
    InstructionClass.FMA: _chain_fma,
    InstructionClass.AVX512_BF16: _chain_avx512_bf16,
    InstructionClass.AMX_BF16: _chain_amx_bf16,
}


def _pad_columns(x: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple))


def _flush(x: torch.Tensor) -> torch.Tensor:
    """Denormals to zeros of the same sign."""
    return torch.where(x.abs() < SMALLEST_NORMAL, x * 0.0, x)


def _round_flush(x: torch.Tensor) -> torch.Tensor:
    return _flush(x.float().double())


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """fp32 fused multiply-add, elementwise and exact.

    The float64 sum is rounded to odd (its last bit records whether it is inexact), after which rounding
    to fp32 gives what a single rounding would (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()  # 48 bits: exact
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's two-sum: exact
    bits = total.view(torch.int64)
    is_even_and_inexact = (error != 0) & (bits & 1 == 0) & total.isfinite() & error.isfinite()
    towards_zero = (error < 0) != (total < 0)
    adjusted = torch.where(towards_zero, bits - 1, bits + 1)
    return torch.where(is_even_and_inexact, adjusted, bits).view(torch.float64).float()


_LOG2_E = float.fromhex("0x1.715476p+0")
_LN2_HIGH = float.fromhex("0x1.62e4p-1")
_LN2_LOW = float.fromhex("0x1.7f7d1cp-20")
_ROUND = 12582912.0 + 127.0  # 1.5 * 2**23: adding it rounds to an integer, to nearest even
_EXP_COEFFICIENTS = (  # of exp(r), highest power first, for |r| <= ln(2)/2; fitted, relative error 4e-9
    *map(float.fromhex, ("0x1.6a1080p-10", "0x1.1245c8p-7", "0x1.55593cp-5", "0x1.555482p-3", "0x1.fffffcp-2")),
    1.0,
    1.0,
)
EXP_LOWEST = -87.33  # below: 0; the results down to here are normal numbers
EXP_HIGHEST = 88.37  # above: infinity


def exp(x: torch.Tensor) -> torch.Tensor:
    """fp32 exponential; NaN stays NaN, exp(-inf) = 0, exp(0) = 1."""
    inside = x.clamp(EXP_LOWEST, EXP_HIGHEST)  # NaN passes
    n = fma(inside, torch.full_like(inside, _LOG2_E), torch.full_like(inside, _ROUND)) - _ROUND
    r = fma(n, torch.full_like(n, -_LN2_HIGH), inside)
    r = fma(n, torch.full_like(n, -_LN2_LOW), r)
    p = torch.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = fma(p, r, torch.full_like(r, coefficient))
    power = torch.ldexp(torch.ones_like(n, dtype=torch.float64), n.nan_to_num(0.0).int()).float()
    result = p * power
    result = torch.where(x < EXP_LOWEST, torch.zeros_like(x), result)
    return torch.where(x > EXP_HIGHEST, torch.full_like(x, torch.inf), result)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """fp32, correctly rounded. torch's own is MKL's, which is that on Intel's processors only: on an AMD EPYC 15 % of
    the results are off by one. A root in double precision never lies so near to the middle of two fp32 numbers that
    its last bits matter."""
    return x.double().sqrt().float()


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate / (1 + exp(-gate)) * up in fp32."""
    return gate / (exp(-gate) + 1.0) * up


def row_sum(x_TC: torch.Tensor) -> torch.Tensor:
    """(T, 1) fp32: column c goes to lane chain c mod 16, ascending; then the lanes are halved 8, 4, 2, 1."""
    padded = torch.unflatten(_pad_columns(x_TC, LANES), 1, (-1, LANES))
    lanes = x_TC.new_zeros((x_TC.shape[0], LANES))
    for column in range(padded.shape[1]):
        lanes = lanes + padded[:, column]
    return _halve(lanes)


def _halve(lanes: torch.Tensor) -> torch.Tensor:
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes
