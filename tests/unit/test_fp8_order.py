"""Operands of the FP8 probes and the GPU's tests: another order of the groups must show in them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cluster.engine.kernels.fp8 import GROUP
from cluster.engine.kernels.probes_fp8 import order_revealing_e4m3

ROWS, OUTPUTS, INPUTS = 64, 1008, 1664  # as in tests/gpu/test_fp8.py


def group_sums(x: torch.Tensor, w: torch.Tensor, num_bits: int) -> list[torch.Tensor]:
    """fp32 (M, N) of each group, kept to about as many bits of its largest product as a tensor core keeps."""
    sums = []
    for start in range(0, x.shape[1], GROUP):
        x_g, w_g = (part[:, start : start + GROUP].view(torch.float8_e4m3fn).double() for part in (x, w))
        exact = x_g @ w_g.t()
        unit = torch.exp2(torch.floor(torch.log2(x_g.abs().amax() * w_g.abs().amax())) - num_bits)
        sums.append((torch.trunc(exact / unit) * unit).float())
    return sums


def added(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(sums[0])
    for each in sums:
        total = total + each
    return total


@pytest.mark.parametrize("num_bits", [13, 40])
@pytest.mark.parametrize(("rows", "outputs"), [(ROWS, OUTPUTS), (17, 96)])
def test_another_order_of_the_groups_changes_many_values(rows: int, outputs: int, num_bits: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x, w = order_revealing_e4m3(rows, outputs, INPUTS, generator)
    assert bool(x.view(torch.float8_e4m3fn).float().isfinite().all())
    assert bool(w.view(torch.float8_e4m3fn).float().isfinite().all())
    sums = group_sums(x, w, num_bits)
    expected = added(sums)
    assert int((added(sums[::-1]) != expected).sum()) > expected.numel() // 2
    for first in range(1, len(sums) - 1):  # a sum of two has no order, so the first two groups may change places
        swapped = [*sums[:first], sums[first + 1], sums[first], *sums[first + 2 :]]
        assert int((added(swapped) != expected).sum()) > expected.numel() // 50, first


def test_random_numbers_would_not_show_it() -> None:
    """Why there are operands for it."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randint(0, 256, (count, INPUTS), generator=generator, dtype=torch.uint8) for count in (ROWS, OUTPUTS))
    x, w = (torch.where(values & 0x7F == 0x7F, 0, values) for values in (x, w))
    sums = group_sums(x, w, 13)
    assert int((added(sums[::-1]) != added(sums)).sum()) < 10
