"""Arithmetic written as instructions has the bits of what it stands for."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from cluster.engine.kernels.triton.gluon_math import quotient, rounded_to_bf16

BLOCK = 4096


@gluon.jit
def _kernel(a_ptr, b_ptr, quotient_ptr, rounded_ptr, BLOCK: gl.constexpr):
    at = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [4], [0]))
    a = gl.load(a_ptr + at)
    gl.store(quotient_ptr + at, quotient(a, gl.load(b_ptr + at)))
    gl.store(rounded_ptr + at, rounded_to_bf16(a))


def check(a: torch.Tensor, b: torch.Tensor) -> None:
    """A thread's numbers are 128 apart, so each of its branches has them from all over."""
    a, b = (torch.nn.functional.pad(x, (0, -len(x) % BLOCK), value=1.0).cuda() for x in (a, b))
    quotients, rounded = torch.empty_like(a), torch.empty_like(a)
    _kernel[(len(a) // BLOCK,)](a, b, quotients, rounded, BLOCK, num_warps=4)
    for found, expected in ((quotients, a / b), (rounded, a.bfloat16().float())):
        is_nan = expected.isnan()
        assert torch.equal(found.isnan(), is_nan)
        same = found.view(torch.int32) == expected.view(torch.int32)
        assert bool((same | is_nan).all())


@pytest.mark.parametrize("mantissas", [0x7F0000, 0x7FFFFF], ids=["bf16", "fp32"])
def test_usual_numbers(mantissas: int) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda most: torch.randint(0, most, (1 << 24,), generator=generator, dtype=torch.int32)  # noqa: E731
    a = ((draw(119) + 68) << 23) | (draw(1 << 23) & mantissas) | (draw(2) << 31)
    b = ((draw(60) + 127) << 23) | draw(1 << 23)
    check(a.view(torch.float32), b.view(torch.float32))


def test_a_sigmoid_of_every_bf16_number() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    for order in (numbers, numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))]):
        check(order, 1.0 + torch.exp(-order))
