"""Recount the block manager's books from the holders. Used by tests and at quiescence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from cluster.engine.block_holders import BlockTable, Lease, Reservation
from cluster.engine.block_pool import BlockPool


def check_integrity(
    pool: BlockPool,
    tables: Collection[BlockTable],
    leases: Collection[Lease],
    reservations: Collection[Reservation],
) -> None:
    """AssertionError names the first thing that does not add up."""
    owners = Counter(block for table in tables for block in table.block_ids)
    owners.update(block for held in reservations for block in held.block_ids[: held.num_shared_blocks])
    pins = Counter(block for lease in leases for block in lease.block_ids)
    lent = Counter(block for held in reservations for block in held.loading_block_ids)
    free = Counter([*pool.free_unnamed, *pool.free_named])
    for block in range(len(pool.generations)):
        assert pool.num_owners[block] == owners[block], f"block {block}: owners {pool.num_owners[block]}"
        assert pool.num_pins[block] == pins[block], f"block {block}: pins {pool.num_pins[block]}"
        is_held = owners[block] + pins[block] > 0
        places = int(is_held) + lent[block] + free[block]
        assert places == 1, (
            f"block {block} is in {places} places: held {is_held}, lent {lent[block]}, free {free[block]}"
        )
    pinned_only = sum(1 for block, count in pins.items() if count and not owners[block])
    assert pool.num_pinned_only == pinned_only, f"pinned only: {pool.num_pinned_only}, counted {pinned_only}"
    _check_names(pool, lent)
    _check_writable(tables, owners)


def _check_names(pool: BlockPool, lent: Counter[int]) -> None:
    named = {block: digest for block, digest in enumerate(pool.digest_of) if digest is not None}
    assert {digest: block for block, digest in named.items()} == pool.block_of, "names and blocks differ"
    assert not any(lent[block] for block in named), "a block that is being written has a name"
    assert all(block in named for block in pool.free_named), "a free block lost its name"
    assert not any(block in named for block in pool.free_unnamed), "a named block is among the unnamed"


def _check_writable(tables: Collection[BlockTable], owners: Counter[int]) -> None:
    for table in tables:
        for block in table.block_ids[table.num_registered :]:
            assert owners[block] == 1, f"block {block} may be written by one owner and belongs to {owners[block]}"
