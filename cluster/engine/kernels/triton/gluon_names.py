"""Gluon is experimental: what Triton 3.6 called otherwise than later releases, under one name."""

from __future__ import annotations

import functools

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of all threads of a warp group
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_Buffers = gl.shared_memory_descriptor
reinterpret = _Buffers.reinterpret if hasattr(_Buffers, "reinterpret") else _Buffers._reinterpret


@functools.cache
def shared_layout(swizzle_bytes: int, element_bits: int) -> gl.NVMMASharedLayout:
    """Of a matrix's boxes as the tensor core reads them. Frozen, so all launches share one: to make it takes longer
    than the descriptor it is for."""
    return gl.NVMMASharedLayout(swizzle_bytes, element_bits, 2)
