"""Shards cover every column once, in rank order, whatever the sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.parallel.sharding import split_columns, split_heads
from cluster.errors import ConfigError


@given(total=st.integers(1, 5000), size=st.integers(1, 64))
def test_columns_are_covered_once_and_evenly(total: int, size: int) -> None:
    if size > total:
        return
    parts = [split_columns(total, rank, size) for rank in range(size)]
    assert (parts[0].start, parts[-1].stop) == (0, total)
    assert all(left.stop == right.start for left, right in pairwise(parts))
    assert all(part.length > 0 for part in parts)
    assert max(part.length for part in parts) - min(part.length for part in parts) < 32


@given(num_kv_heads=st.integers(1, 16), group=st.integers(1, 16), size=st.integers(1, 64))
def test_heads_are_covered_once_and_keep_their_kv_head(num_kv_heads: int, group: int, size: int) -> None:
    num_heads = num_kv_heads * group
    fits = size <= num_kv_heads or (size % num_kv_heads == 0 and group % (size // num_kv_heads) == 0)
    if not fits:
        with pytest.raises(ConfigError, match=rf"tensor parallel size {size} does not fit"):
            split_heads(num_heads, num_kv_heads, 0, size)
        return
    shards = [split_heads(num_heads, num_kv_heads, rank, size) for rank in range(size)]
    heads = [head for shard in shards for head in range(shard.query.start, shard.query.stop)]
    assert heads == list(range(num_heads))
    for shard in shards:
        local_group = shard.query.length // shard.kv.length
        for local, head in enumerate(range(shard.query.start, shard.query.stop)):
            assert shard.kv.start + local // local_group == head // group
