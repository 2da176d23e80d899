"""The KV tensor of one engine and the description of its layout.

Shape legend: N blocks, L layers, 2 (K then V), H KV heads, S tokens in a block, D head size. Models with latent
attention store one row per token, which serves as key and as value: there the axis called 2 has the length 1
and D is the width of that row.

    kv_NL2HSD: one allocation, block-major: everything of one block (all layers) is contiguous, so
    that a hand-over moves few large pieces (design: layout decides the speed of the data plane).
"""

from __future__ import annotations

import msgspec
import torch


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Geometry of a KV pool, exchanged in the handshake and used by the transfer planner."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str = "bfloat16"
    num_planes: int = 2  # K and V; 1: one latent row that is both

    @property
    def element_bytes(self) -> int:
        return {"bfloat16": 2, "float16": 2, "float32": 4}[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Bytes of one (block, layer, plane, head): `block_size` tokens, contiguous."""
        return self.block_size * self.head_size * self.element_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_planes * self.num_kv_heads * self.head_bytes


class KVCache:
    """Owns the pool. Freed with the object; whoever registers its memory must deregister first."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        """Raises torch.OutOfMemoryError if it does not fit; zeroed."""
        self.layout = layout
        self.num_blocks = num_blocks
        planes, heads = layout.num_planes, layout.num_kv_heads
        shape = (num_blocks, layout.num_layers, planes, heads, layout.block_size, layout.head_size)
        self.kv_NL2HSD = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)

    def layer(self, layer_index: int) -> torch.Tensor:
        """View (N, 2, H, S, D) of one layer; strided, the block stride spans all layers."""
        return self.kv_NL2HSD[:, layer_index]
