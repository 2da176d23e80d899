"""Tandem. `LLM` and what it needs are imported when they are first used: `import cluster` imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.embedded import LLM, Completion
    from cluster.engine.config import EngineConfig
    from cluster.types import SamplingParams

__all__ = ["LLM", "Completion", "EngineConfig", "SamplingParams"]


def __getattr__(name: str) -> object:
    match name:
        case "LLM" | "Completion":
            from cluster import embedded

            return getattr(embedded, name)
        case "EngineConfig":
            from cluster.engine.config import EngineConfig

            return EngineConfig
        case "SamplingParams":
            from cluster.types import SamplingParams

            return SamplingParams
    raise AttributeError(f"module 'cluster' has no attribute {name!r}")
