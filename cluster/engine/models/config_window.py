"""Which layers of a model have a sliding window, by its files' own rules. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.engine.models.config import Architecture, ModelConfig, SlidingWindow
from cluster.errors import ModelError
from cluster.model_files.gguf_header import GGUFHeader

_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULT_SIZE = 4096  # of transformers, where config.json has no `sliding_window`, but for Mixtral
_QWEN_FIRST_WINDOWED_LAYER = 28  # of transformers, where config.json has no `max_window_layers`
_QWEN = (Architecture.QWEN2, Architecture.QWEN3)


class WindowFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that say which layers have a window, as they stand there."""

    sliding_window: int | msgspec.UnsetType | None
    use_sliding_window: bool
    max_window_layers: int | None
    layer_types: Sequence[str] | None


def window_from_huggingface(fields: WindowFields, config: ModelConfig, path: Path) -> SlidingWindow | None:
    """As transformers computes it; `ModelError` names what it would not compute as the file says.

    Mistral and Mixtral have a window in all layers or in none. Qwen2 and Qwen3 have one if `use_sliding_window` says
    so, in the layers from `max_window_layers` on or in those that `layer_types` lists; Qwen3-MoE in all.
    """
    architecture = config.architecture
    size = _size(fields, architecture)
    listed = None if fields.layer_types is None else _listed(fields.layer_types, config.num_layers, path)
    if size is not None and size <= 0:
        raise ModelError(f"{path}: sliding_window is {size}")
    if size is not None and size >= config.max_position:  # it holds every context
        return None
    if architecture is Architecture.LLAMA and size is not None:
        raise ModelError(f"{path}: sliding_window {size} is not supported for llama")
    if architecture is Architecture.QWEN3_MOE and size is not None and fields.max_window_layers:
        raise ModelError(f"{path}: use_sliding_window together with max_window_layers is not supported for qwen3_moe")
    is_windowed = _by_rule(fields, config, size)
    if listed is not None:
        if any(listed) and size is None:
            raise ModelError(f"{path}: layer_types has {_SLIDING!r}, and no sliding_window is in use")
        if listed != is_windowed and architecture not in _QWEN:
            expected = _FULL if size is None else _SLIDING
            raise ModelError(f"{path}: layer_types other than {expected!r} are not supported for {architecture.value}")
        is_windowed = listed
    return None if size is None else _window(size, is_windowed)


def _size(fields: WindowFields, architecture: Architecture) -> int | None:
    """None: no layer has a window."""
    has_switch = architecture not in (Architecture.MISTRAL, Architecture.MIXTRAL)
    if has_switch and not fields.use_sliding_window:
        return None
    if fields.sliding_window is not msgspec.UNSET:
        return fields.sliding_window
    return None if architecture in (Architecture.LLAMA, Architecture.MIXTRAL) else _DEFAULT_SIZE


def _by_rule(fields: WindowFields, config: ModelConfig, size: int | None) -> list[bool]:
    """Which layers have a window where `layer_types` does not say it."""
    first = 0
    if config.architecture in _QWEN:
        first = _QWEN_FIRST_WINDOWED_LAYER if fields.max_window_layers is None else fields.max_window_layers
    return [size is not None and index >= first for index in range(config.num_layers)]


def _listed(layer_types: Sequence[str], num_layers: int, path: Path) -> list[bool]:
    unknown = sorted(set(layer_types) - {_FULL, _SLIDING})
    if unknown:
        raise ModelError(f"{path}: layer_types {unknown[0]!r} is not supported (supported: {_FULL}, {_SLIDING})")
    if len(layer_types) != num_layers:
        raise ModelError(f"{path}: {len(layer_types)} layer_types for {num_layers} layers")
    return [kind == _SLIDING for kind in layer_types]


def window_from_gguf(header: GGUFHeader, config: ModelConfig) -> SlidingWindow | None:
    """Of all layers, or of those for which `sliding_window_pattern` is true. 0, as no key: no window.

    Files that llama.cpp made of Mistral 0.1 lack the key: llama.cpp computes full attention for them, and so do we.
    """
    size_key = f"{header.architecture}.attention.sliding_window"
    pattern_key = f"{size_key}_pattern"
    size = header.get(size_key, int, 0)
    if size < 0:
        raise ModelError(f"{header.path}: {size_key} is {size}")
    if not 0 < size < config.max_position:
        return None
    if pattern_key not in header.metadata:
        return _window(size, [True] * config.num_layers)
    if not isinstance(header.metadata[pattern_key], list):
        raise ModelError(f"{header.path}: {pattern_key} is not supported unless it lists all layers")
    is_windowed = header.require_list(pattern_key, bool)
    if len(is_windowed) != config.num_layers:
        raise ModelError(f"{header.path}: {pattern_key} lists {len(is_windowed)} of {config.num_layers} layers")
    return _window(size, is_windowed)


def _window(size: int, is_windowed: list[bool]) -> SlidingWindow | None:
    if not any(is_windowed):
        return None
    return SlidingWindow(size=size, full_layers=tuple(i for i, windowed in enumerate(is_windowed) if not windowed))
