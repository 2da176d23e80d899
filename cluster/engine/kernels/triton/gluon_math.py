"""Arithmetic of a tile's end in fewer and less dependent instructions than Triton's own: same bits."""

from __future__ import annotations

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _folded(instruction: str, registers: Sequence[str], operands: Sequence[str]) -> list[str]:
    """As a tree, into the first register."""
    lines = [f"{instruction} {registers[i]}, {operands[i]}, {operands[i + 1]};" for i in range(0, len(operands), 2)]
    left = registers[: len(operands) : 2]
    return lines + (_folded(instruction, left, left) if len(left) > 1 else [])


def _quotients(count: int) -> str:
    """As `div.rn.f32` is assembled, but with one branch for all of them instead of one each, so that they overlap.

    It is a reciprocal, a Newton step for it and one for the quotient, rounded correctly as long as nothing on the way
    leaves the normal numbers. With a from 2^-60 and a and b up to 2^60 nothing does. For others, NaN among them, there
    is the division.
    """
    numerators = [f"${count + i}" for i in range(count)]
    denominators = [f"${2 * count + i}" for i in range(count)]
    sizes = [f"size{i}" for i in range(count)]
    most = [f"most{i}" for i in range(2 * count)]
    least = [f"least{i}" for i in range(count)]
    lines = [
        "{",
        ".reg .pred usual;",
        f".reg .f32 {', '.join([*sizes, *most, *least])};",
        ".reg .f32 reciprocal, minus, error, estimate;",
        *(f"abs.f32 {size}, {a};" for size, a in zip(sizes, numerators, strict=True)),
        *_folded("max.NaN.f32", most, [*sizes, *denominators]),
        *_folded("min.NaN.f32", least, sizes),
        "setp.ge.f32 usual, least0, 0f21800000;",
        "setp.le.and.f32 usual, most0, 0f5D800000, usual;",
        "@!usual bra unusual;",
    ]
    for i, (a, b) in enumerate(zip(numerators, denominators, strict=True)):
        lines += [
            f"rcp.approx.ftz.f32 reciprocal, {b};",
            f"neg.f32 minus, {b};",
            "fma.rn.f32 error, minus, reciprocal, 0f3F800000;",
            "fma.rn.f32 reciprocal, reciprocal, error, reciprocal;",
            f"mul.rn.f32 estimate, {a}, reciprocal;",
            f"fma.rn.f32 error, minus, estimate, {a};",
            f"fma.rn.f32 ${i}, reciprocal, error, estimate;",
        ]
    lines += ["bra done;", "unusual:"]
    lines += [f"div.rn.f32 ${i}, {a}, {b};" for i, (a, b) in enumerate(zip(numerators, denominators, strict=True))]
    return "\n".join([*lines, "done:", "}"])


def _operands(count: int) -> str:
    return ",".join(["=&f"] * count + ["f"] * 2 * count)


_QUOTIENTS_4 = gl.constexpr(_quotients(4))
_QUOTIENTS_8 = gl.constexpr(_quotients(8))
_OPERANDS_4 = gl.constexpr(_operands(4))
_OPERANDS_8 = gl.constexpr(_operands(8))
_ROUND_TWO = gl.constexpr("""{
.reg .b32 both;
cvt.rn.bf16x2.f32 both, $3, $2;
shl.b32 $0, both, 16;
and.b32 $1, both, 0xffff0000;
}""")


@gluon.jit
def quotient(a, b):
    """`gl.div_rn` of fp32, b at least 1 or NaN; for a warp group, each thread of which has 4 at least."""
    if a.numel < 8 * 128:
        result = gl.inline_asm_elementwise(_QUOTIENTS_4, _OPERANDS_4, [a, b], gl.float32, is_pure=True, pack=4)
    else:
        result = gl.inline_asm_elementwise(_QUOTIENTS_8, _OPERANDS_8, [a, b], gl.float32, is_pure=True, pack=8)
    return result


@gluon.jit
def rounded_to_bf16(x):
    """`x.to(gl.bfloat16).to(gl.float32)` of fp32. Triton's converts one number at a time, in the slow unit that is to
    compute exponentials."""
    return gl.inline_asm_elementwise(_ROUND_TWO, "=f,=f,f,f", [x], gl.float32, is_pure=True, pack=2)


@gluon.jit
def sigmoid_weighted(x):
    """`linear._sigmoid_weighted`."""
    return quotient(x, 1.0 + gl.exp(-x))


@gluon.jit
def silu_mul(gate, up):
    """`fp8_linear.silu_mul`."""
    return sigmoid_weighted(rounded_to_bf16(gate)) * rounded_to_bf16(up)
