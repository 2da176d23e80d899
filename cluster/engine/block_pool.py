"""Physical KV blocks: counts, generations, names and the order in which free ones are reused.

The half of the block manager that knows single blocks; `block_manager.py` knows who holds them.
Pure Python.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

AllocationListener = Callable[[int, int], None]  # (block id, its new generation)


class BlockPool:
    """A block is free, held (owners + pins > 0), or lent to a transfer (`num_lent`, counted only).

    A free block may have a name, the digest of its content; it can be revived by that name until it is
    taken for something else. Unnamed blocks are taken first, then the least recently freed.
    """

    def __init__(self, num_blocks: int, on_allocated: AllocationListener | None) -> None:
        self.generations = [0] * num_blocks
        self.on_allocated = on_allocated
        self.num_owners = [0] * num_blocks
        self.num_pins = [0] * num_blocks
        self.num_pinned_only = 0
        self.digest_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.free_unnamed: deque[int] = deque(range(num_blocks))
        self.free_named: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.free_unnamed) + len(self.free_named)

    def is_free(self, block: int) -> bool:
        """Of a named block: an unnamed free one has no other name to be asked by."""
        return block in self.free_named

    def take_new(self, count: int) -> list[int]:
        """`count` <= num_free blocks for new content: unnamed, in a new generation, held by nobody yet."""
        taken = []
        for _ in range(count):
            if self.free_unnamed:
                block = self.free_unnamed.popleft()
            else:
                block, _none = self.free_named.popitem(last=False)
                self.forget_name(block)
            self.generations[block] += 1
            if self.on_allocated is not None:
                self.on_allocated(block, self.generations[block])
            taken.append(block)
        return taken

    def put_free(self, block: int) -> None:
        """The last holder left."""
        assert self.num_owners[block] == 0
        assert self.num_pins[block] == 0
        if self.digest_of[block] is None:
            self.free_unnamed.append(block)
        else:
            self.free_named[block] = None

    def add_owner(self, block: int) -> None:
        """One more owner of a new block or of one found by name, free or not."""
        if self.num_owners[block] == 0:
            if self.num_pins[block]:
                self.num_pinned_only -= 1
            elif self.digest_of[block] is not None:
                del self.free_named[block]
        self.num_owners[block] += 1

    def drop_owner(self, block: int) -> None:
        self.num_owners[block] -= 1
        assert self.num_owners[block] >= 0
        if self.num_owners[block] == 0:
            if self.num_pins[block]:
                self.num_pinned_only += 1
            else:
                self.put_free(block)

    def add_pin(self, block: int) -> None:
        assert self.num_owners[block] > 0, "a lease is taken by an owner"
        self.num_pins[block] += 1

    def drop_pin(self, block: int) -> None:
        self.num_pins[block] -= 1
        assert self.num_pins[block] >= 0
        if self.num_pins[block] == 0 and self.num_owners[block] == 0:
            self.num_pinned_only -= 1
            self.put_free(block)

    def give_name(self, block: int, digest: bytes) -> None:
        """Make a held block findable. If another block has this content already, that one stays."""
        assert self.num_owners[block] > 0
        if digest not in self.block_of:
            assert self.digest_of[block] is None, "a named block is never written again"
            self.block_of[digest] = block
            self.digest_of[block] = digest

    def forget_name(self, block: int) -> None:
        digest = self.digest_of[block]
        if digest is not None:
            del self.block_of[digest]
            self.digest_of[block] = None

    def forget_all_names(self) -> None:
        self.block_of.clear()
        self.digest_of = [None] * len(self.digest_of)
        self.free_unnamed.extend(self.free_named)
        self.free_named.clear()
