"""The sampling functions of the native CPU library (`kernels/cpu/csrc/sampling.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.library import VARIANTS, open_library, supports


@dataclass(frozen=True, slots=True)
class NativeFunctions:
    """One instruction set's; they release the GIL. Pointers are to contiguous memory."""

    gumbel_argmax: Callable[[int, int | None, int, int, int], int]  # scaled, ids, count, seed, position
    softmax_mass: Callable[[int, int, int], None]  # scaled, count, mass

    def draw(
        self, scaled_C: npt.NDArray[np.float32], ids_C: npt.NDArray[np.int64] | None, seed: int, position: int
    ) -> int:
        """Place of the winner in `scaled_C`; its ids are 0..C-1 where `ids_C` is None."""
        assert scaled_C.flags.c_contiguous
        assert ids_C is None or ids_C.flags.c_contiguous
        pointer = None if ids_C is None else ids_C.ctypes.data
        return self.gumbel_argmax(scaled_C.ctypes.data, pointer, len(scaled_C), seed, position)

    def mass(self, scaled_C: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """exp(scaled) in units of 2**-40."""
        assert scaled_C.flags.c_contiguous
        mass_C = np.empty(len(scaled_C), np.int64)
        self.softmax_mass(scaled_C.ctypes.data, len(scaled_C), mass_C.ctypes.data)
        return mass_C


def open_functions() -> NativeFunctions | None:
    """None if there is no library for this machine (a warning has said why)."""
    library = open_library()
    if library is None:
        return None
    variant = next(each for each in VARIANTS[InstructionClass.FMA] if supports(library, each))
    return functions_of(library, variant)


def functions_of(library: ctypes.CDLL, variant: str) -> NativeFunctions:
    gumbel_argmax = library[f"tandem_sampling_{variant}_gumbel_argmax"]
    gumbel_argmax.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    gumbel_argmax.restype = ctypes.c_int64
    softmax_mass = library[f"tandem_sampling_{variant}_softmax_mass"]
    softmax_mass.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    softmax_mass.restype = None
    return NativeFunctions(gumbel_argmax, softmax_mass)
