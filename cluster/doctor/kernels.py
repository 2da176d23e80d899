"""Which kernels this machine has admitted (docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.doctor.finding import Finding, ok


def admitted() -> Iterator[Finding]:
    from cluster.engine.kernels import get_ops

    yield ok("Kernels", get_ops("cpu").name)
