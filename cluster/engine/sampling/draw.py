"""Drawing one token from one row, by the reference and by the native library.

A token is drawn with the Gumbel-max trick: argmax over the candidates of scaled logit + noise(seed,
position, id), ties to the lower id. That is a draw from the softmax, needs no normalisation, can be cut
at any vocabulary column, and a verifier of speculated tokens repeats it exactly.
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import msgspec
import torch

from cluster.engine.sampling import filters, noise
from cluster.engine.sampling.native import open_functions
from cluster.engine.sampling.native_draw import NativeDraw
from cluster.types import SamplingParams

logger = logging.getLogger(__name__)


class Draw(Protocol):
    """Draws from single rows; waits for the device."""

    def __call__(self, logits_V: torch.Tensor, top: float, sampling: SamplingParams, position: int) -> int:
        """`logits_V` fp32 without NaN, `top` its finite maximum, temperature > 0; the token id."""
        ...


def reference_draw(logits_V: torch.Tensor, top: float, sampling: SamplingParams, position: int) -> int:
    """The definition, on any device."""
    scaled_V = filters.scale(logits_V, top, sampling)
    ids_C = filters.candidates(scaled_V, sampling)
    draws = [(sampling.seed, position)]
    if ids_C is None:
        noise_V = noise.gumbel(noise.philox_bits_of_all(draws, len(scaled_V), scaled_V.device)[0])
        return first_largest(scaled_V.add_(noise_V))
    scores_C = scaled_V[ids_C].add_(noise.gumbel(noise.philox_bits(draws, ids_C)[0]))
    return int(ids_C[first_largest(scores_C)])


def first_largest(values: torch.Tensor) -> int:
    """Index of the largest value, ties to the lower index; of the first NaN if there is one."""
    return int(values.argmax())


def choose_draw(device: torch.device) -> Draw:
    """The native library's where this is a CPU, it opens, and it draws what the reference draws."""
    return _cpu_draw() if device.type == "cpu" else reference_draw


@functools.cache  # of this process: neither the library nor the processor changes
def _cpu_draw() -> Draw:
    functions = open_functions()
    if functions is None:
        return reference_draw
    native = NativeDraw(functions)
    if equals_reference(native):
        return native
    logger.warning("The native sampler differs from the reference and is not used.")
    return reference_draw


def equals_reference(draw: Draw) -> bool:
    """Admission is by equality, not by argument."""
    for logits_V, sampling in admission_cases():
        top = float(logits_V.max())
        for position in (1, 1000):
            if draw(logits_V, top, sampling, position) != reference_draw(logits_V, top, sampling, position):
                return False
    return True


def admission_cases() -> list[tuple[torch.Tensor, SamplingParams]]:
    """Rows of lengths around the vector width, flat and peaked, with masked tokens and ties."""
    generator = torch.Generator().manual_seed(20)
    parameters: tuple[dict[str, float], ...] = (
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.5, "min_p": 0.001},
    )
    cases: list[tuple[torch.Tensor, SamplingParams]] = []
    for index, length in enumerate((3, 16, 17, 63, 64, 65, 200, 1009)):
        logits_V = torch.randn(length, generator=generator) * (0.0, 1.0, 4.0)[index % 3]
        logits_V[torch.rand(length, generator=generator) < 0.1] = -torch.inf
        logits_V[length // 2] = 1.0
        for temperature in (1e-6, 0.7):
            for extra in parameters:
                sampling = SamplingParams(max_tokens=1, seed=index << 40, temperature=temperature)
                cases.append((logits_V, msgspec.structs.replace(sampling, **extra)))
    return cases
