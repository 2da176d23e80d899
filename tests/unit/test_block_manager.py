"""The block manager's books: unit cases, and a state machine against a model of what each block holds."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_holders import BlockState, BlockTable, Lease, Reservation
from cluster.engine.block_manager import BlockManager

SIZE = 4


def chain_of(tokens: array[int] | list[int], salt: bytes = b"") -> BlockHashChain:
    return BlockHashChain(array("i", tokens), SIZE, salt)


def computed(blocks: BlockManager, tokens: list[int], salt: bytes = b"") -> BlockTable:
    chain = chain_of(tokens, salt)
    table = blocks.allocate(chain, len(tokens), len(tokens) - 1)
    assert table is not None
    blocks.register_computed(table, chain, len(tokens))
    return table


@pytest.mark.parametrize(("length", "num_shared"), [(7, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_whole_prompt_in_the_cache_gets_a_private_last_block_vllm_50558(length: int, num_shared: int) -> None:
    blocks = BlockManager(16, SIZE)
    tokens = list(range(length))
    first = computed(blocks, tokens)
    second = blocks.allocate(chain_of(tokens), length, length - 1)
    assert second is not None
    assert second.num_cached_tokens == num_shared * SIZE < length
    assert second.block_ids[:num_shared] == first.block_ids[:num_shared]
    assert not set(second.block_ids[num_shared:]) & set(first.block_ids)
    blocks.check_integrity()


def test_equal_content_computed_twice_keeps_the_first_name_and_both_tables() -> None:
    blocks = BlockManager(8, SIZE)
    chains = [chain_of(list(range(8))) for _ in range(2)]
    tables = [blocks.allocate(chain, 8, 7) for chain in chains]
    for table, chain in zip(tables, chains, strict=True):
        assert table is not None
        blocks.register_computed(table, chain, 8)
    assert tables[1] is not None
    blocks.free(tables[1])
    blocks.check_integrity()
    assert blocks.num_cached_tokens(chain_of(list(range(8))), 8) == 8


def test_salts_share_nothing() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, list(range(9)), salt=b"tenant a")
    assert blocks.num_cached_tokens(chain_of(list(range(9)), b"tenant a"), 8) == 8
    assert blocks.num_cached_tokens(chain_of(list(range(9)), b"tenant b"), 8) == 0
    assert blocks.num_cached_tokens(chain_of(list(range(9))), 8) == 0


def test_same_tokens_after_another_prefix_are_not_found() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    computed(blocks, [9, 9, 9, 9, 0, 0, 0, 0])
    assert blocks.num_cached_tokens(chain_of([9, 2, 3, 4, 5, 6, 7, 8]), 8) == 0
    assert blocks.num_cached_tokens(chain_of([9, 9, 9, 9, 5, 6, 7, 8]), 8) == 4


def test_generation_grows_with_new_content_only() -> None:
    seen: list[tuple[int, int]] = []
    blocks = BlockManager(4, SIZE, on_allocated=lambda block, generation: seen.append((block, generation)))
    table = computed(blocks, list(range(9)))
    assert seen == [(0, 1), (1, 1), (2, 1)]
    blocks.free(table)
    again = computed(blocks, list(range(9)))  # two blocks revived, the last taken anew
    assert again.num_cached_tokens == 8
    assert blocks.generations == [1, 1, 1, 1]
    blocks.free(again)
    other = blocks.allocate(chain_of(list(range(50, 66))), 16, 15)
    assert other is not None
    assert blocks.generations == [2, 2, 2, 2]
    assert blocks.num_cached_tokens(chain_of(list(range(9))), 8) == 0


def test_listener_set_later_hears_of_every_block_first() -> None:
    blocks = BlockManager(3, SIZE)
    computed(blocks, [1, 2, 3, 4, 5])
    mirror = [-1] * 3
    blocks.set_allocation_listener(mirror.__setitem__)
    assert mirror == [1, 1, 0]
    computed(blocks, [9])
    assert mirror == blocks.generations == [1, 1, 1]


def test_least_recently_freed_content_goes_first_and_a_prefix_after_what_builds_on_it() -> None:
    blocks = BlockManager(4, SIZE)
    old, new = computed(blocks, list(range(8))), computed(blocks, list(range(100, 108)))
    blocks.free(old)
    blocks.free(new)
    table = blocks.allocate(chain_of([200]), 1, 0)
    assert table is not None
    assert blocks.num_cached_tokens(chain_of(list(range(8))), 8) == 4
    assert blocks.num_cached_tokens(chain_of(list(range(100, 108))), 8) == 8


def test_failed_allocation_changes_nothing() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.free(computed(blocks, list(range(8))))
    generations = list(blocks.generations)
    assert blocks.allocate(chain_of(list(range(17))), 17, 16) is None
    assert blocks.allocate(chain_of(list(range(16))), 16, 15, keep_free=1) is None
    assert blocks.generations == generations
    assert blocks.num_free == 4
    table = blocks.allocate(chain_of(list(range(16))), 16, 15)
    assert table is not None
    assert not blocks.grow(table, 17)
    assert len(table.block_ids) == 4
    blocks.check_integrity()


def test_leased_blocks_stay_until_released() -> None:
    blocks = BlockManager(3, SIZE)
    table = computed(blocks, list(range(9)))
    lease = blocks.pin(table, 9)
    assert (blocks.num_owned, blocks.num_pinned) == (3, 0)
    blocks.free(table)
    assert (blocks.num_owned, blocks.num_pinned, blocks.num_free) == (0, 3, 0)
    assert blocks.allocate(chain_of([77]), 1, 0) is None
    sharer = blocks.allocate(chain_of(list(range(8))), 8, 8)
    assert sharer is not None
    assert (blocks.num_owned, blocks.num_pinned) == (2, 1)
    blocks.free(sharer)
    blocks.release(lease)
    assert blocks.num_free == 3
    assert lease.generations == tuple(blocks.generations[block] for block in lease.block_ids)
    blocks.check_integrity()


def test_destination_is_not_freed_while_a_transfer_may_land_tensorrt_llm_12542() -> None:
    blocks = BlockManager(2, SIZE)
    reservation = blocks.reserve(chain_of(list(range(8))), 8)
    assert reservation is not None
    blocks.start_loading(reservation)
    assert not blocks.abort(reservation)
    assert not blocks.abort(reservation)
    assert (blocks.num_draining, blocks.num_loading, blocks.num_free) == (2, 0, 0)
    assert blocks.allocate(chain_of([5]), 1, 0) is None
    blocks.check_integrity()
    blocks.finish_draining(reservation)
    assert blocks.num_free == 2
    assert blocks.num_cached_tokens(chain_of(list(range(8))), 8) == 0


def test_reservation_loads_only_what_the_cache_lacks_and_is_found_after_commit_only() -> None:
    blocks = BlockManager(8, SIZE)
    prefix = computed(blocks, list(range(5)))
    chain = chain_of(list(range(12)))
    reservation = blocks.reserve(chain, 12)
    assert reservation is not None
    assert reservation.num_cached_tokens == 4
    assert reservation.block_ids[0] == prefix.block_ids[0]
    assert len(reservation.loading_block_ids) == 2
    assert blocks.num_cached_tokens(chain_of(list(range(12))), 12) == 4
    blocks.start_loading(reservation)
    table = blocks.commit(reservation, chain)
    assert blocks.num_cached_tokens(chain_of(list(range(12))), 12) == 12
    assert blocks.num_loading == 0
    blocks.free(table)
    blocks.free(prefix)
    blocks.check_integrity()


def test_after_a_reset_nothing_that_was_begun_before_is_found() -> None:
    blocks = BlockManager(8, SIZE)
    tokens = array("i", range(6))
    chain = BlockHashChain(tokens, SIZE, b"")
    table = blocks.allocate(chain, 6, 5)
    assert table is not None
    blocks.register_computed(table, chain, 6)
    blocks.free(computed(blocks, list(range(50, 55))))
    blocks.reset_prefix_cache()
    tokens.extend(range(6, 9))
    assert blocks.grow(table, 9)
    blocks.register_computed(table, chain, 9)
    assert blocks.num_cached_tokens(chain_of(list(range(9))), 8) == 0
    assert blocks.num_cached_tokens(chain_of(list(range(50, 55))), 4) == 0
    computed(blocks, list(range(4)))
    assert blocks.num_cached_tokens(chain_of(list(range(9))), 8) == 4
    blocks.check_integrity()


def test_integrity_check_notices_a_lost_block() -> None:
    blocks = BlockManager(4, SIZE)
    table = computed(blocks, [1, 2, 3, 4, 5])
    table.block_ids.pop()
    with pytest.raises(AssertionError, match="block 1: owners 1"):
        blocks.check_integrity()


@dataclass(eq=False)
class Held:
    tokens: array[int]
    salt: bytes
    chain: BlockHashChain
    table: BlockTable


@dataclass(eq=False)
class Loading:
    tokens: array[int]
    salt: bytes
    chain: BlockHashChain
    reservation: Reservation


class BlockManagerMachine(RuleBasedStateMachine):
    """`content[block]` is what a device would hold: (salt, the whole prefix). Whoever is given a cached
    prefix must find exactly its own prefix there; whoever writes must be alone."""

    running: Bundle[Held] = Bundle("running")
    leases: Bundle[Lease] = Bundle("leases")
    loading: Bundle[Loading] = Bundle("loading")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, SIZE, on_allocated=self._forget)
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.holders: list[array[int]] = []
        self.leased: list[Lease] = []

    def _forget(self, block: int, generation: int) -> None:
        assert all(block not in holder for holder in self.holders), "a held block was given away"
        assert all(block not in lease.block_ids for lease in self.leased), "a leased block was given away"
        self.content.pop(block, None)

    def _write(self, block_ids: array[int], tokens: array[int], salt: bytes, start: int) -> None:
        for index in range(start // SIZE, -(-len(tokens) // SIZE)):
            block = block_ids[index]
            assert sum(block in holder for holder in self.holders) == 1, "a shared block is written"
            self.content[block] = (salt, tuple(tokens[: (index + 1) * SIZE]))

    def _check_cached(self, block_ids: array[int], tokens: array[int], salt: bytes, num_cached: int) -> None:
        for index in range(num_cached // SIZE):
            assert self.content[block_ids[index]] == (salt, tuple(tokens[: (index + 1) * SIZE]))

    prompts = st.tuples(st.integers(0, 1), st.integers(1, 17))
    salts = st.sampled_from([b"", b"other"])

    @rule(target=running, prompt=prompts, salt=salts, keep_free=st.integers(0, 2))
    def allocate(self, prompt: tuple[int, int], salt: bytes, keep_free: int) -> Held | MultipleResults[Held]:
        tokens = array("i", [prompt[0], *range(1, prompt[1])])
        chain = BlockHashChain(tokens, SIZE, salt)
        num_free = self.blocks.num_free
        table = self.blocks.allocate(chain, len(tokens), len(tokens) - 1, keep_free)
        if table is None:
            assert self.blocks.num_free == num_free
            return multiple()
        assert self.blocks.num_free >= keep_free
        self._check_cached(table.block_ids, tokens, salt, table.num_cached_tokens)
        self.holders.append(table.block_ids)
        self._write(table.block_ids, tokens, salt, table.num_cached_tokens)
        return Held(tokens, salt, chain, table)

    @rule(held=running)
    def register(self, held: Held) -> None:
        self.blocks.register_computed(held.table, held.chain, len(held.tokens))

    @rule(held=running, token=st.integers(0, 1))
    def decode(self, held: Held, token: int) -> None:
        held.tokens.append(token)
        if self.blocks.grow(held.table, len(held.tokens)):
            self._write(held.table.block_ids, held.tokens, held.salt, len(held.tokens) - 1)
        else:
            held.tokens.pop()

    @rule(held=running, num_drafts=st.integers(1, 9), keep_free=st.integers(0, 2))
    def guess_in_vain(self, held: Held, num_drafts: int, keep_free: int) -> None:
        """Rows behind the tokens are written, count for nothing, and their blocks are given back."""
        num_free, num_tokens = self.blocks.num_free, len(held.tokens)
        if self.blocks.grow(held.table, num_tokens + num_drafts, keep_free):
            assert num_free == self.blocks.num_free or self.blocks.num_free >= keep_free
            self.blocks.shrink(held.table, num_tokens)
        assert self.blocks.num_free == num_free
        assert len(held.table.block_ids) == self.blocks.num_blocks_for(num_tokens)

    @rule(held=consumes(running))
    def free(self, held: Held) -> None:
        self.holders.remove(held.table.block_ids)
        self.blocks.free(held.table)

    @rule(target=leases, held=running)
    def pin(self, held: Held) -> Lease:
        lease = self.blocks.pin(held.table, len(held.tokens))
        self.leased.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        assert lease.generations == tuple(self.blocks.generations[block] for block in lease.block_ids)
        self.leased.remove(lease)
        self.blocks.release(lease)

    @rule(target=loading, prompt=prompts, salt=salts)
    def reserve(self, prompt: tuple[int, int], salt: bytes) -> Loading | MultipleResults[Loading]:
        tokens = array("i", [prompt[0], *range(1, prompt[1])])
        chain = BlockHashChain(tokens, SIZE, salt)
        reservation = self.blocks.reserve(chain, len(tokens))
        if reservation is None:
            return multiple()
        self._check_cached(reservation.block_ids, tokens, salt, reservation.num_cached_tokens)
        self.holders.append(reservation.block_ids)
        return Loading(tokens, salt, chain, reservation)

    @rule(held=loading)
    def start_loading(self, held: Loading) -> None:
        if held.reservation.state is not BlockState.DRAINING:
            self.blocks.start_loading(held.reservation)

    @rule(target=running, held=consumes(loading))
    def commit(self, held: Loading) -> Held | MultipleResults[Held]:
        reservation = held.reservation
        if reservation.state is BlockState.DRAINING:
            self.holders.remove(reservation.block_ids)
            self.blocks.finish_draining(reservation)
            return multiple()
        self._write(reservation.block_ids, held.tokens, held.salt, reservation.num_cached_tokens)
        return Held(held.tokens, held.salt, held.chain, self.blocks.commit(reservation, held.chain))

    @precondition(lambda self: self.blocks.num_loading > 0)
    @rule(target=loading, held=consumes(loading))
    def abort(self, held: Loading) -> Loading | MultipleResults[Loading]:
        reservation = held.reservation
        if reservation.state is BlockState.RESERVED:
            self.holders.remove(reservation.block_ids)
            assert self.blocks.abort(reservation)
            return multiple()
        assert not self.blocks.abort(reservation)
        return held

    @rule()
    def reset_prefix_cache(self) -> None:
        self.blocks.reset_prefix_cache()

    @invariant()
    def books_are_right(self) -> None:
        blocks = self.blocks
        blocks.check_integrity()
        states = (blocks.num_free, blocks.num_owned, blocks.num_pinned, blocks.num_loading, blocks.num_draining)
        assert min(states) >= 0
        assert sum(states) == blocks.num_blocks


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_table_that_shrinks_gives_back_its_last_blocks_and_says_so() -> None:
    """Growing again may bring other blocks in their place, so a copy of the table must know."""
    blocks = BlockManager(8, SIZE)
    table = blocks.allocate(chain_of(list(range(2 * SIZE))), 2 * SIZE, 0)
    assert table is not None
    assert blocks.grow(table, 4 * SIZE)
    before = list(table.block_ids)
    blocks.shrink(table, 3 * SIZE)
    blocks.shrink(table, 2 * SIZE + 1)
    assert (list(table.block_ids), table.num_shrinks, blocks.num_free) == (before[:3], 1, 5)
    blocks.check_integrity()
    assert blocks.grow(table, 4 * SIZE)
    assert list(table.block_ids) != before
    assert not blocks.grow(table, 8 * SIZE, keep_free=1)
    assert blocks.grow(table, 7 * SIZE, keep_free=1)
    blocks.check_integrity()
