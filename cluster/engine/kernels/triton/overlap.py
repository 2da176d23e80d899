"""Programmatic dependent launch: a kernel is set up while its predecessor still runs.

Every kernel that may be launched so begins with `begin`, in all of its programs and before it touches
memory: it waits until all kernels before it are complete and their writes are visible, then lets its
own successor be set up. A program that returned without waiting would let the successor overtake.

LAUNCH_FIRST turns the two around: the successor is set up while the kernel's own predecessors still run,
and with it whatever it does before its wait (`linear_stream.py`, `linear_hopper.py`). Waits still chain: a kernel
is complete only after its own wait, so whoever waited for it waited for everything before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LAUNCH_FIRST = 2  # a value of PDL; 0 (False) is off, 1 (True) waits first


@triton.jit
def begin(PDL: tl.constexpr):
    if PDL == 2:
        gdc_launch_dependents()
        gdc_wait()
    elif PDL:
        gdc_wait()
        gdc_launch_dependents()


def overlap(pdl: int) -> dict[str, int]:
    """Launch options of a kernel that begins with `begin`; `pdl` as there."""
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": 0}
