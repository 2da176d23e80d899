"""Which bytes of a source pool belong where in a destination pool. Pure.

Both pools are laid out NL2HSD (`cluster/engine/kv_cache.py`), but block size, the range of layers
(pipeline stage) and the range of KV heads (tensor-parallel rank) may differ in any way. Cutting is
done at the finest place where either side ends; neighbours are joined again, so equal geometries give
one piece per block, and adjacent blocks one piece in all.

    tokens      |  source block 0  |  source block 1  |        a run ends where either block ends
                | destination 0 | destination 1 | ...          one template of pieces per shape of run
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import msgspec

from cluster.engine.kv_cache import KVLayout
from kvconnector.base import Piece


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the model's KV that one rank holds; `layout` counts this rank's layers and heads."""

    layout: KVLayout
    first_layer: int = 0
    first_kv_head: int = 0

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.layout.num_layers)

    @property
    def kv_heads(self) -> range:
        return range(self.first_kv_head, self.first_kv_head + self.layout.num_kv_heads)

    def offset(self, layer: int, which: int, kv_head: int, token: int) -> int:
        """Byte offset in a block of one row; `which` is its plane (0 for K, 1 for V), the rest is global."""
        layout = self.layout
        plane_index = (layer - self.first_layer) * layout.num_planes + which
        head_index = plane_index * layout.num_kv_heads + kv_head - self.first_kv_head
        return head_index * layout.head_bytes + token * layout.head_size * layout.element_bytes


def plan(
    sources: Sequence[tuple[Shard, Sequence[int]]],
    destination: tuple[Shard, Sequence[int]],
    start: int,
    end: int,
) -> list[list[Piece]]:
    """For each source, the pieces to READ from it so that tokens `start:end` are in `destination`.

    A shard comes with the block ids of the sequence in its pool. Where several sources hold the same
    layer and head (replicas), the first one is read. Blocks of equal size are copied whole, so the
    tail of the last one holds what the source has there. Raises `ValueError` if no source has a part
    that the destination needs, or if dtype, head size or number of planes differ.
    """
    shard, block_ids = destination
    missing = {(layer, head) for layer in shard.layers for head in shard.kv_heads}
    plans: list[list[Piece]] = []
    for source, source_block_ids in sources:
        if _row_kind(source.layout) != _row_kind(shard.layout):
            raise ValueError("source and destination differ in head size, dtype or number of planes")
        wanted = frozenset(
            (layer, head) for layer in source.layers for head in source.kv_heads if (layer, head) in missing
        )
        missing -= wanted
        plans.append(list(join(_pieces(source, source_block_ids, shard, block_ids, wanted, start, end))))
    if missing:
        layer, head = min(missing)
        raise ValueError(f"no source holds layer {layer}, KV head {head}")
    return plans


def _row_kind(layout: KVLayout) -> tuple[int, str, int]:
    return layout.head_size, layout.dtype, layout.num_planes


def _pieces(
    source: Shard,
    source_block_ids: Sequence[int],
    destination: Shard,
    destination_block_ids: Sequence[int],
    cells: frozenset[tuple[int, int]],
    start: int,
    end: int,
) -> Iterator[Piece]:
    source_size, destination_size = source.layout.block_size, destination.layout.block_size
    if source_size == destination_size:
        end = -(-end // source_size) * source_size
    token = start
    while token < end:
        source_index, source_token = divmod(token, source_size)
        destination_index, destination_token = divmod(token, destination_size)
        num_tokens = min(source_size - source_token, destination_size - destination_token, end - token)
        source_base = source_block_ids[source_index] * source.layout.block_bytes
        destination_base = destination_block_ids[destination_index] * destination.layout.block_bytes
        for piece in _template(source, destination, cells, source_token, destination_token, num_tokens):
            yield Piece(source_base + piece.source_offset, destination_base + piece.destination_offset, piece.num_bytes)
        token += num_tokens


@lru_cache(maxsize=512)
def _template(
    source: Shard,
    destination: Shard,
    cells: frozenset[tuple[int, int]],
    source_token: int,
    destination_token: int,
    num_tokens: int,
) -> tuple[Piece, ...]:
    """The pieces of one run of tokens, relative to the two blocks it lies in."""
    num_bytes = num_tokens * source.layout.head_size * source.layout.element_bytes
    rows = (
        Piece(
            source.offset(layer, which, head, source_token),
            destination.offset(layer, which, head, destination_token),
            num_bytes,
        )
        for layer in source.layers
        for which in range(source.layout.num_planes)
        for head in source.kv_heads
        if (layer, head) in cells
    )
    return tuple(join(rows))


def join(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Merge consecutive pieces that are adjacent on both sides."""
    held: Piece | None = None
    for piece in pieces:
        if (
            held is not None
            and held.source_offset + held.num_bytes == piece.source_offset
            and held.destination_offset + held.num_bytes == piece.destination_offset
        ):
            held = Piece(held.source_offset, held.destination_offset, held.num_bytes + piece.num_bytes)
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held
