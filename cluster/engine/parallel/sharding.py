"""Which part of a layer a tensor-parallel rank holds. Pure arithmetic, no torch.

Every linear layer is split by output column only ("gather, then multiply", docs/numerics.md), so any
split gives the same bits; ranges need not be equal.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.errors import ConfigError

_COLUMN_UNIT = 16  # shard boundaries fall on multiples of it where the layer is wide enough


class Range(NamedTuple):
    """Half-open: start, start+1, ..., stop-1."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class HeadShard(NamedTuple):
    """Heads of one rank. Each KV head of it serves the same number of its query heads."""

    query: Range
    kv: Range


def split_columns(total: int, rank: int, size: int) -> Range:
    """Columns of `rank` when `total` columns are spread over `size` ranks, as even as units allow."""
    assert 0 <= rank < size <= total
    unit = _COLUMN_UNIT if total >= size * _COLUMN_UNIT else 1
    num_units = total // unit

    def boundary(index: int) -> int:
        return total if index == size else num_units * index // size * unit

    return Range(boundary(rank), boundary(rank + 1))


def split_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShard:
    """Heads of `rank`: whole KV groups while there are enough of them, then parts of one group, with
    its KV head held by each of the ranks that share it.

    Raises `ConfigError` if `size` is larger than the KV heads and does not divide evenly.
    """
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        kv = Range(num_kv_heads * rank // size, num_kv_heads * (rank + 1) // size)
        return HeadShard(Range(kv.start * group, kv.stop * group), kv)
    ranks_per_kv_head = size // num_kv_heads
    if size % num_kv_heads or group % ranks_per_kv_head:
        raise ConfigError(
            f"tensor parallel size {size} does not fit {num_heads} heads and {num_kv_heads} KV heads: beyond "
            f"{num_kv_heads} it must be {num_kv_heads} times a divisor of {group}"
        )
    kv_head = rank // ranks_per_kv_head
    length = group // ranks_per_kv_head
    return HeadShard(Range(rank * length, (rank + 1) * length), Range(kv_head, kv_head + 1))
