"""The transfer planner: every byte of the destination exactly once, from the right place."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.kv_cache import KVLayout
from kvconnector.base import Piece
from kvconnector.mapping import Shard, plan

DIM, DTYPE = 4, "bfloat16"
POOL_BLOCKS = 24


def make_shard(block_size: int, layers: range, heads: range) -> Shard:
    layout = KVLayout(
        num_layers=len(layers), num_kv_heads=len(heads), head_size=DIM, block_size=block_size, dtype=DTYPE
    )
    return Shard(layout=layout, first_layer=layers.start, first_kv_head=heads.start)


def cut(total: int, parts: int) -> list[range]:
    bounds = [total * at // parts for at in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(bounds) if high > low]


def shards(num_layers: int, num_heads: int, pp: int, tp: int, block_size: int) -> list[Shard]:
    """All ranks of a group; heads are replicated when there are more ranks than heads."""
    head_ranges = (
        cut(num_heads, tp) if tp <= num_heads else [range(at % num_heads, at % num_heads + 1) for at in range(tp)]
    )
    return [make_shard(block_size, layers, heads) for layers in cut(num_layers, pp) for heads in head_ranges]


def fill(shard: Shard, block_ids: list[int], num_tokens: int) -> np.ndarray:
    """A pool (flat elements) whose rows name themselves: (layer, which, head, token)."""
    layout = shard.layout
    pool = np.full((POOL_BLOCKS, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, DIM), -1, dtype=np.int16)
    for token in range(num_tokens):
        block, offset = block_ids[token // layout.block_size], token % layout.block_size
        for l_index, layer in enumerate(shard.layers):
            for which in (0, 1):
                for h_index, head in enumerate(shard.kv_heads):
                    pool[block, l_index, which, h_index, offset] = ((layer * 2 + which) * 8 + head) * 128 + token
    return pool.reshape(-1)


def copy(source: np.ndarray, destination: np.ndarray, written: np.ndarray, pieces: list[Piece]) -> None:
    for piece in pieces:
        assert piece.num_bytes > 0
        assert piece.source_offset % 2 == piece.destination_offset % 2 == piece.num_bytes % 2 == 0
        src, dst, length = piece.source_offset // 2, piece.destination_offset // 2, piece.num_bytes // 2
        assert src + length <= len(source)
        destination[dst : dst + length] = source[src : src + length]
        written[dst : dst + length] += 1


@settings(max_examples=150, deadline=None)
@given(
    source_size=st.sampled_from([2, 3, 4, 8]),
    destination_size=st.sampled_from([2, 3, 4, 8]),
    source_degrees=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    destination_degrees=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    num_layers=st.integers(1, 4),
    num_heads=st.integers(1, 3),
    num_tokens=st.integers(1, 20),
    num_skipped_blocks=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_every_destination_byte_is_written_once_from_the_right_place(
    source_size: int,
    destination_size: int,
    source_degrees: tuple[int, int],
    destination_degrees: tuple[int, int],
    num_layers: int,
    num_heads: int,
    num_tokens: int,
    num_skipped_blocks: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    start = min(num_skipped_blocks * destination_size, num_tokens)

    def blocks(size: int) -> list[int]:
        return [int(block) for block in random.permutation(POOL_BLOCKS)[: -(-num_tokens // size)]]

    sources = [(shard, blocks(source_size)) for shard in shards(num_layers, num_heads, *source_degrees, source_size)]
    pools = [fill(shard, block_ids, num_tokens) for shard, block_ids in sources]
    for shard in shards(num_layers, num_heads, *destination_degrees, destination_size):
        block_ids = blocks(destination_size)
        expected = fill(shard, block_ids, num_tokens)
        got = np.full_like(expected, -1)
        written = np.zeros(len(expected), dtype=np.int64)
        for pool, pieces in zip(pools, plan(sources, (shard, block_ids), start, num_tokens), strict=True):
            copy(pool, got, written, pieces)
        for token in range(num_tokens):
            block, offset = block_ids[token // destination_size], token % destination_size
            shape = (POOL_BLOCKS, shard.layout.num_layers, 2, shard.layout.num_kv_heads, destination_size, DIM)
            if token >= start:
                assert (written.reshape(shape)[block, :, :, :, offset] == 1).all()
                assert (
                    got.reshape(shape)[block, :, :, :, offset] == expected.reshape(shape)[block, :, :, :, offset]
                ).all()
            else:
                assert (written.reshape(shape)[block, :, :, :, offset] == 0).all()
        assert written.max(initial=0) <= 1
        untouched = np.ones(POOL_BLOCKS, dtype=bool)
        untouched[block_ids] = False
        assert not written.reshape(POOL_BLOCKS, -1)[untouched].any()


def test_equal_geometry_moves_whole_blocks_and_joins_neighbours() -> None:
    shard = make_shard(4, range(3), range(2))
    size = shard.layout.block_bytes
    [pieces] = plan([(shard, [5, 6, 7, 1])], (shard, [9, 10, 11, 3]), 0, 14)
    assert pieces == [Piece(5 * size, 9 * size, 3 * size), Piece(size, 3 * size, size)]


def test_a_prefix_that_is_there_is_not_read() -> None:
    shard = make_shard(4, range(1), range(1))
    [pieces] = plan([(shard, [5, 6, 7])], (shard, [1, 2, 3]), 8, 12)
    size = shard.layout.block_bytes
    assert pieces == [Piece(7 * size, 3 * size, size)]


def test_replicated_heads_are_read_from_one_source() -> None:
    shard = make_shard(4, range(1), range(1))
    first, second = plan([(shard, [5]), (shard, [6])], (shard, [1]), 0, 4)
    assert len(first) == 1
    assert second == []


def test_a_missing_part_is_named() -> None:
    with pytest.raises(ValueError, match="layer 1"):
        plan([(make_shard(4, range(1), range(2)), [0])], (make_shard(4, range(2), range(2)), [0]), 0, 4)


@pytest.mark.parametrize(("source_size", "destination_size"), [(4, 4), (8, 2), (3, 4)])
def test_latent_rows_have_one_plane_and_come_from_any_rank(source_size: int, destination_size: int) -> None:
    """All ranks hold the same rows: the first one is read, each layer from its stage."""
    num_tokens, layers = 11, range(2)

    def latent(block_size: int, held: range) -> Shard:
        layout = KVLayout(
            num_layers=len(held), num_kv_heads=1, head_size=DIM, block_size=block_size, dtype=DTYPE, num_planes=1
        )
        return Shard(layout=layout, first_layer=held.start)

    def pool(shard: Shard) -> np.ndarray:
        shape = (POOL_BLOCKS, shard.layout.num_layers, 1, 1, shard.layout.block_size, DIM)
        return np.full(shape, -1, dtype=np.int16)

    sources = [latent(source_size, held) for held in (range(1), range(1), range(1, 2))]
    source_blocks = list(range(7, 7 - -(-num_tokens // source_size), -1))
    filled = []
    for shard in sources:
        rows = pool(shard)
        for token in range(num_tokens):
            rows[source_blocks[token // source_size], 0, 0, 0, token % source_size] = shard.first_layer * 100 + token
        filled.append(rows)
    destination = latent(destination_size, layers)
    blocks = list(range(3, 3 + -(-num_tokens // destination_size)))
    plans = plan([(shard, source_blocks) for shard in sources], (destination, blocks), 0, num_tokens)
    assert plans[1] == []
    result = pool(destination)
    written = np.zeros(result.size, dtype=np.int16)
    for rows, pieces in zip(filled, plans, strict=True):
        copy(rows.reshape(-1), result.reshape(-1), written, pieces)
    assert written.max() == 1
    for token in range(num_tokens):
        found = result[blocks[token // destination_size], :, 0, 0, token % destination_size]
        assert found.tolist() == [[layer * 100 + token] * DIM for layer in layers]
    with pytest.raises(ValueError, match="differ in head size, dtype or number of planes"):
        plan([(make_shard(4, layers, range(1)), source_blocks)], (destination, blocks), 0, num_tokens)
