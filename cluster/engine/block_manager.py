"""Who holds which KV block. Pure Python: decides, never touches a tensor.

    FREE -- allocate --> OWNED -- free --> FREE            blocks of a running sequence
                           |
                       pin (a lease)                       stay readable for a peer, whoever owns them
                           v
                         PINNED -- release --> FREE        the sequence left, the lease did not
    FREE -- reserve --> RESERVED -- start_loading --> LOADING -- commit --> OWNED
                           |                             |
                         abort                         abort      a transfer may still land:
                           v                             v        DRAINING until it cannot
                         FREE                         DRAINING -- finish_draining --> FREE

Every block is in exactly one state, so free + owned + pinned + loading + draining = total at all
times (`check_integrity`; RESERVED is counted as loading, OWNED wins over PINNED).

Sharing. A full block whose content was computed here, or verified after a transfer, may be shared by
any number of tables and is never written again. What still has to be written belongs to one table
only. A freed block can be found by its content until it is allocated for something else.

Generations. `generations[b]` counts how often block b was allocated for new content. It grows before
the new owner can write, so a reader that sees the same generation before and after its READ has read
what it was promised. A block found by its content keeps its generation, as it keeps its content.
"""

from __future__ import annotations

from array import array

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.block_holders import BlockState, BlockTable, Lease, Reservation
from cluster.engine.block_integrity import check_integrity
from cluster.engine.block_pool import AllocationListener, BlockPool


class BlockManager:
    """Accounts for `num_blocks` blocks of `block_size` tokens. Not thread-safe: engine thread only.

    `on_allocated(block, generation)` is called before the new owner can write the block.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        on_allocated: AllocationListener | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs a block of at least one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks, on_allocated)
        self._tables: set[BlockTable] = set()
        self._leases: set[Lease] = set()
        self._reservations: set[Reservation] = set()
        self._num_loading = 0
        self._num_draining = 0
        self._epoch = 0  # of the prefix cache: grows with each reset

    # ---- gauges

    @property
    def generations(self) -> list[int]:
        """By block id. Read only."""
        return self._pool.generations

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_pinned(self) -> int:
        """Blocks that only leases hold."""
        return self._pool.num_pinned_only

    @property
    def num_loading(self) -> int:
        """Blocks reserved for a transfer, before or during it."""
        return self._num_loading

    @property
    def num_draining(self) -> int:
        return self._num_draining

    @property
    def num_owned(self) -> int:
        return self.num_blocks - self.num_free - self.num_pinned - self._num_loading - self._num_draining

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def set_allocation_listener(self, on_allocated: AllocationListener) -> None:
        """Mirror the generations: called once for every block now, and at each allocation from now on."""
        for block, generation in enumerate(self.generations):
            on_allocated(block, generation)
        self._pool.on_allocated = on_allocated

    # ---- running sequences

    def allocate(
        self, chain: BlockHashChain, num_tokens: int, max_reusable_tokens: int, keep_free: int = 0
    ) -> BlockTable | None:
        """Blocks for `num_tokens` tokens. The leading ones come from the prefix cache where it has them,
        but cover at most `max_reusable_tokens`: a position that must be computed must be writable, so a
        prompt that is found whole gets a last block of its own (vllm#50558). None, and nothing has
        changed, unless `keep_free` blocks would remain free."""
        taken = self._take(chain, num_tokens, max_reusable_tokens, keep_free)
        if taken is None:
            return None
        shared, new = taken
        for block in new:
            self._pool.add_owner(block)
        table = BlockTable(array("i", shared + new), len(shared), len(shared) * self.block_size, self._epoch)
        self._tables.add(table)
        return table

    def grow(self, table: BlockTable, num_tokens: int, keep_free: int = 0) -> bool:
        """Make room for `num_tokens` tokens in all. False, and nothing has changed, if that takes blocks and
        fewer than `keep_free` would remain."""
        num_new = self.num_blocks_for(num_tokens) - len(table.block_ids)
        if num_new <= 0:
            return True
        if num_new + keep_free > self.num_free:
            return False
        for block in self._pool.take_new(num_new):
            self._pool.add_owner(block)
            table.block_ids.append(block)
        return True

    def shrink(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks behind the first `num_tokens` tokens: nothing that counts was stored there."""
        num_kept = self.num_blocks_for(num_tokens)
        assert num_kept >= table.num_registered, "a registered block holds tokens of the sequence"
        table.num_shrinks += len(table.block_ids) > num_kept
        while len(table.block_ids) > num_kept:
            self._pool.drop_owner(table.block_ids.pop())

    def register_computed(self, table: BlockTable, chain: BlockHashChain, num_computed_tokens: int) -> None:
        """Offer the full blocks among the first `num_computed_tokens` tokens to the prefix cache. Their
        KV has been stored; they are never written again."""
        num_full = num_computed_tokens // self.block_size
        if self.enable_prefix_caching and table.epoch == self._epoch:
            for index in range(table.num_registered, num_full):
                self._pool.give_name(table.block_ids[index], chain.digest(index))
        table.num_registered = max(table.num_registered, num_full)

    def free(self, table: BlockTable) -> None:
        """The sequence needs its blocks no more; leased ones stay readable."""
        self._tables.remove(table)
        for block in reversed(table.block_ids):  # a prefix is reused later than what builds on it
            self._pool.drop_owner(block)

    # ---- leases

    def pin(self, table: BlockTable, num_tokens: int) -> Lease:
        """Keep the blocks of the first `num_tokens` tokens readable until `release`."""
        assert table in self._tables
        block_ids = tuple(table.block_ids[: self.num_blocks_for(num_tokens)])
        for block in block_ids:
            self._pool.add_pin(block)
        lease = Lease(block_ids, tuple(self.generations[block] for block in block_ids), num_tokens)
        self._leases.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        self._leases.remove(lease)
        for block in reversed(lease.block_ids):
            self._pool.drop_pin(block)

    # ---- destinations of transfers

    def reserve(self, chain: BlockHashChain, num_tokens: int, keep_free: int = 0) -> Reservation | None:
        """Blocks for `num_tokens` tokens that were computed elsewhere. None, and nothing has changed,
        unless `keep_free` blocks would remain free."""
        taken = self._take(chain, num_tokens, num_tokens, keep_free)
        if taken is None:
            return None
        shared, new = taken
        self._num_loading += len(new)
        cached = len(shared) * self.block_size
        reservation = Reservation(array("i", shared + new), num_tokens, cached, len(shared), self._epoch)
        self._reservations.add(reservation)
        return reservation

    def start_loading(self, reservation: Reservation) -> None:
        """To be called before a transfer into the blocks is posted: from now on they may be written."""
        assert reservation.state in (BlockState.RESERVED, BlockState.LOADING)
        reservation.state = BlockState.LOADING

    def commit(self, reservation: Reservation, chain: BlockHashChain) -> BlockTable:
        """Every transfer has completed and what arrived was verified: the blocks are a sequence's now,
        and the full ones may be shared."""
        assert reservation.state in (BlockState.RESERVED, BlockState.LOADING)
        self._reservations.remove(reservation)
        for block in reservation.loading_block_ids:
            self._num_loading -= 1
            self._pool.add_owner(block)
        table = BlockTable(
            reservation.block_ids, reservation.num_shared_blocks, reservation.num_cached_tokens, reservation.epoch
        )
        self._tables.add(table)
        self.register_computed(table, chain, reservation.num_tokens)
        return table

    def abort(self, reservation: Reservation) -> bool:
        """Give up. True: the blocks are free. False: a transfer may still land in them; they are
        DRAINING and the caller owes `finish_draining`. Idempotent while draining."""
        assert reservation in self._reservations
        match reservation.state:
            case BlockState.RESERVED:
                self._num_loading -= len(reservation.loading_block_ids)
                self._free_reserved(reservation)
                return True
            case BlockState.LOADING:
                reservation.state = BlockState.DRAINING
                self._num_loading -= len(reservation.loading_block_ids)
                self._num_draining += len(reservation.loading_block_ids)
        return False

    def finish_draining(self, reservation: Reservation) -> None:
        """No transfer can land any more: each has completed, failed, or was confirmed cancelled."""
        assert reservation.state is BlockState.DRAINING
        self._num_draining -= len(reservation.loading_block_ids)
        self._free_reserved(reservation)

    # ---- the prefix cache

    def reset_prefix_cache(self) -> None:
        """Forget what every block holds. Sequences that began before offer nothing to the cache any more:
        the reason for a reset (new weights) may make their KV wrong for others."""
        self._epoch += 1
        self._pool.forget_all_names()

    def forget_content(self, table: BlockTable) -> None:
        """Nobody shall find what these blocks hold: it is broken, and its sequence is about to end."""
        for block in table.block_ids:
            self._pool.forget_name(block)

    def num_cached_tokens(self, chain: BlockHashChain, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens an allocation would find; changes nothing."""
        return len(self._find_prefix(chain, num_tokens)) * self.block_size

    def check_integrity(self) -> None:
        """Recount everything from the holders; AssertionError names what does not add up."""
        check_integrity(self._pool, self._tables, self._leases, self._reservations)
        assert self._num_loading == self._count(BlockState.RESERVED) + self._count(BlockState.LOADING)
        assert self._num_draining == self._count(BlockState.DRAINING)

    def _count(self, state: BlockState) -> int:
        return sum(len(held.loading_block_ids) for held in self._reservations if held.state is state)

    def _take(
        self, chain: BlockHashChain, num_tokens: int, max_reusable_tokens: int, keep_free: int
    ) -> tuple[list[int], list[int]] | None:
        """(shared blocks, owner added; new blocks, held by nobody yet)."""
        shared = self._find_prefix(chain, max_reusable_tokens)
        num_new = self.num_blocks_for(num_tokens) - len(shared)
        num_revived = sum(1 for block in shared if self._pool.is_free(block))
        if num_new + num_revived + keep_free > self.num_free:
            return None
        for block in shared:
            self._pool.add_owner(block)
        return shared, self._pool.take_new(num_new)

    def _find_prefix(self, chain: BlockHashChain, max_tokens: int) -> list[int]:
        found: list[int] = []
        if self.enable_prefix_caching:
            for index in range(max_tokens // self.block_size):
                block = self._pool.block_of.get(chain.digest(index))
                if block is None:
                    break
                found.append(block)
        return found

    def _free_reserved(self, reservation: Reservation) -> None:
        self._reservations.remove(reservation)
        for block in reservation.loading_block_ids:
            self._pool.put_free(block)
        for block in reversed(reservation.block_ids[: reservation.num_shared_blocks]):
            self._pool.drop_owner(block)
