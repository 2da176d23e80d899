"""Programmatic dependent launch: a kernel is set up while its predecessor still runs.

Every kernel that may be launched so begins with `begin`, in all of its programs and before it touches
memory: it waits until all kernels before it are complete and their writes are visible, then lets its
own successor be set up. A program that returned without waiting would let the successor overtake.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def overlap(pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel that begins with `begin`."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
