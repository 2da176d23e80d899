"""Rings of buffers in shared memory, as warp groups hand them on."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The buffer after this one, and the parity its barriers complete next."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)
