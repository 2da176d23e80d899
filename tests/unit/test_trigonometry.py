"""cos, sin, powers and roots are right, and the same on every processor."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

from cluster.engine.kernels.cpu.arithmetic import sqrt
from cluster.engine.trigonometry import LARGEST_ANGLE, cos_sin, ln, powers

ULP = 2.0**-53  # of a number, at least
# Of `table()`. Written down, so that a processor of another vendor that computes something else is noticed.
DIGEST = "6ed32359b7cc3501fbbf2dad47267971"


def table() -> torch.Tensor:
    """Angles as rotary embeddings have them, up to a million positions."""
    frequencies = powers(500_000.0, [(-index, 128) for index in range(0, 128, 2)])
    positions = torch.arange(0, 1 << 20, 997, dtype=torch.float64)
    return torch.cat([frequencies[None], *cos_sin(positions[:, None] * frequencies)])


def digest() -> str:
    roots = sqrt(torch.arange(1, 50_000, dtype=torch.float32) / 7.0)
    return hashlib.sha256(table().numpy().tobytes() + roots.numpy().tobytes()).hexdigest()[:32]


def check(angles: torch.Tensor, relative: float = math.inf) -> None:
    """Against the C library's, which are right to less than an ulp."""
    for found, function in zip(cos_sin(angles), (math.cos, math.sin), strict=True):
        expected = torch.tensor([function(angle) for angle in angles.tolist()], dtype=torch.float64)
        difference = (found - expected).abs()
        assert difference.max() <= 2**-52
        assert bool((difference <= relative * expected.abs()).all())


@pytest.mark.parametrize("largest", [1.0, 100.0, 131_072.0, LARGEST_ANGLE])
def test_they_are_right(largest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(20_000, generator=generator, dtype=torch.float64) * largest
    check(angles)


def test_where_the_quarters_meet() -> None:
    angles = torch.arange(2000, dtype=torch.float64) * (math.pi / 4)
    around = torch.cat([angles, torch.nextafter(angles, angles + 1), torch.nextafter(angles, angles - 1).clamp(min=0)])
    check(around, relative=1e-13)  # also where a cosine or a sine is as good as nothing
    assert cos_sin(torch.zeros(1, dtype=torch.float64)) == (torch.ones(1), torch.zeros(1))


def test_powers_are_those_of_the_c_library_to_the_last_bit_or_the_one_before() -> None:
    exponents = [(-index, 128) for index in range(0, 128, 2)] + [(1, 3), (0, 7), (2, 1)]
    for base in (10_000.0, 500_000.0, 1.5):
        expected = torch.tensor([base ** (above / below) for above, below in exponents], dtype=torch.float64)
        assert torch.allclose(powers(base, exponents), expected, rtol=4 * ULP, atol=0.0)


def test_logarithms_are_those_of_the_c_library_to_the_last_bit_or_the_one_before() -> None:
    for value in (1.5, 2.0, 40.0, 10_000.0, 1e-3):
        assert math.isclose(ln(value), math.log(value), rel_tol=2 * ULP)
    assert ln(1.0) == 0.0


def test_a_root_is_the_nearest_number() -> None:
    """The middles between a root and its neighbours have 25 bits, so their squares are exact in double precision."""
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.rand(100_000, generator=generator) * scale for scale in (1e-30, 1e-5, 1.0, 1e20)])
    x = x[x > 0]
    root = sqrt(x)
    below, above = (torch.nextafter(root, torch.full_like(root, to)).double() for to in (0.0, math.inf))
    assert bool((((root + below) / 2) ** 2 < x.double()).all())
    assert bool((((root + above) / 2) ** 2 > x.double()).all())


def test_this_processor_gives_the_bits_of_every_other() -> None:
    assert digest() == DIGEST


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_width_of_vectors_changes_no_bit(capability: str) -> None:
    code = "from tests.unit.test_trigonometry import digest; print(digest())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [DIGEST]
