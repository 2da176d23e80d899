"""A pool in host memory that is told its size: what there is not is refused before anything takes it."""

from __future__ import annotations

import pytest

from cluster.engine import pool_size
from cluster.engine.config import EngineConfig
from cluster.engine.kv_cache import KVLayout
from cluster.errors import StartupError

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_size=16, block_size=16, dtype="float32", num_planes=2)


def config_of(num_bytes: int) -> EngineConfig:
    return EngineConfig(kv_cache_bytes=num_bytes)


def test_more_than_there_is_names_the_key_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_size, "available_memory_bytes", lambda: 1 << 30)
    assert pool_size.choose_num_blocks(LAYOUT, config_of(1 << 30), 64) == (1 << 30) // LAYOUT.block_bytes
    with pytest.raises(StartupError, match=r"kv_cache_bytes is \d+ \(2.00 GiB\), of memory 1.00 GiB are available"):
        pool_size.choose_num_blocks(LAYOUT, config_of(2 << 30), 64)


def test_where_nobody_knows_what_there_is_the_given_size_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> int:
        raise StartupError("/proc/meminfo has no MemAvailable")

    monkeypatch.setattr(pool_size, "available_memory_bytes", unknown)
    assert pool_size.choose_num_blocks(LAYOUT, config_of(2 << 30), 64) > 0
