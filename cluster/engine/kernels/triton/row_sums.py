"""Sums of the rows of a tile in the order of `attention.py`, in the layouts of Hopper's warp groups."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _pair_sums(x):
    left, right = gl.split(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return left + right


@gluon.jit
def lane_sums(p):
    """`attention.lane_sums` of a (rows, 64) tile; the result's layout is the caller's business."""
    x = gl.permute(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), [0, 2, 1])
    x = _pair_sums(_pair_sums(_pair_sums(x)))
    return gl.reshape(x, [p.shape[0], 8])


@gluon.jit
def total(L, layout: gl.constexpr):
    """`attention.total`: (rows, 8) -> (rows,) in a slice of `layout`."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    x = gl.reshape(gl.convert_layout(L, wide), [L.shape[0], 1, 8])
    x = gl.reshape(_pair_sums(_pair_sums(_pair_sums(x))), [L.shape[0]])
    return gl.convert_layout(x, gl.SliceLayout(1, layout))


@gluon.jit
def wide(x, like, layout: gl.constexpr):
    """(rows,) in any layout -> (rows, n) like `like`, whose layout is `layout`."""
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return gl.expand_dims(x, 1) + gl.zeros_like(like)
