"""Layers of the models whose GEMMs are measured, and the row counts."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A weight of N outputs and K inputs. `silu_mul`: N counts both halves of [gate; up]."""

    name: str
    out_features: int
    in_features: int
    silu_mul: bool = False

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.out_features // (2 if self.silu_mul else 1)


LAYERS = (
    Layer("8b.qkv", 6144, 4096),
    Layer("8b.o", 4096, 4096),
    Layer("8b.gate_up", 28672, 4096),
    Layer("8b.down", 4096, 14336),
    Layer("8b.lm_head", 128256, 4096),
    Layer("70b.qkv", 10240, 8192),
    Layer("70b.o", 8192, 8192),
    Layer("70b.gate_up", 57344, 8192),
    Layer("70b.down", 8192, 28672),
    Layer("70b.lm_head", 128256, 8192),
)
FUSED_LAYERS = (
    Layer("8b.gate_up_silu", 28672, 4096, silu_mul=True),
    Layer("70b.gate_up_silu", 57344, 8192, silu_mul=True),
)
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
