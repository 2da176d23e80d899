"""The native variants that this machine can run, for parametrised tests."""

from __future__ import annotations

import functools

import pytest

from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.library import VARIANTS, Functions, open_library, supports
from cluster.engine.kernels.cpu.native import NativeOps
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.probes import Outputs, Probe

ALL_VARIANTS = [variant for variants in VARIANTS.values() for variant in variants]


@functools.cache
def native(variant: str, num_threads: int = 2) -> NativeOps:
    library = open_library()
    if library is None or not supports(library, variant):
        pytest.skip(f"this machine cannot run {variant}")
    return NativeOps(Functions(library, variant), class_of(variant), num_threads)


def reference(variant: str) -> ReferenceOps:
    return ReferenceOps(class_of(variant))


_expected: dict[tuple[str, InstructionClass], Outputs] = {}


def expected_outputs(probe: Probe, instructions: InstructionClass) -> Outputs:
    """The reference's, computed once for all variants of a class."""
    key = (probe.name, instructions)
    if key not in _expected:
        _expected[key] = probe.run(ReferenceOps(instructions))
    return _expected[key]


def class_of(variant: str) -> InstructionClass:
    return next(instructions for instructions, variants in VARIANTS.items() if variant in variants)
