"""Which KV of the draft model is there. Pure Python.

The draft model's pool mirrors the target's: block b of one belongs to block b of the other. So the block
manager's books are those of both, a draft needs no room that the target does not need, and blocks that
the prefix cache finds may bring the draft's KV, too. Often they do not: the prompt was pulled from a
prefill worker, or computed while nothing was guessed. `_generation_of` remembers for which generation of
a block the draft's KV is complete; a block keeps its generation as long as it keeps its content.

    position   0 .......... num_sure .......... num_sure + len(guessed)
               | of the sequence's tokens | of guesses: sure as far as they come true |
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from cluster.engine.block_holders import BlockTable
from cluster.engine.block_manager import BlockManager
from cluster.engine.sequence import Sequence

_NEVER = -1


@dataclass(slots=True)
class _Stored:
    """Of one sequence, as long as it has this table."""

    table: BlockTable
    num_sure: int
    guessed: tuple[int, ...] = ()


class DraftKV:
    """The books of the draft model's pool."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._generation_of = array("q", [_NEVER]) * blocks.num_blocks
        self._stored: dict[int, _Stored] = {}  # by identity of the sequence

    def num_stored(self, sequence: Sequence) -> int:
        """How many of the sequence's first tokens have their draft KV. Never all: the newest lacks it."""
        stored = self._settled(sequence)
        assert stored.num_sure < len(sequence.token_ids)
        return stored.num_sure

    def on_computed(self, sequence: Sequence, num_tokens: int, guessed: tuple[int, ...] = ()) -> None:
        """The KV of its first `num_tokens` tokens, and of these guesses behind them, will be stored before
        anything can read it."""
        stored = self._settled(sequence)
        block_size = self._blocks.block_size
        for index in range(stored.num_sure // block_size, num_tokens // block_size):
            block = stored.table.block_ids[index]
            self._generation_of[block] = self._blocks.generations[block]
        stored.num_sure, stored.guessed = num_tokens, guessed

    def on_released(self, sequence: Sequence) -> None:
        """Its blocks are no longer its own; what they hold may be found again."""
        self._stored.pop(id(sequence), None)

    def _settled(self, sequence: Sequence) -> _Stored:
        """With its guesses compared to what the tokens have become."""
        table, tokens = sequence.table, sequence.token_ids
        assert table is not None
        stored = self._stored.get(id(sequence))
        assert stored is None or stored.table is table
        if stored is None:
            stored = self._stored[id(sequence)] = _Stored(table, self._num_found(table, len(tokens)))
        if stored.guessed and stored.num_sure < len(tokens):
            guessed, stored.guessed = stored.guessed, ()
            num_right = 0
            for guess, token in zip(guessed, tokens[stored.num_sure :], strict=False):
                if guess != token:
                    break
                num_right += 1
            self.on_computed(sequence, stored.num_sure + num_right)
        return stored

    def _num_found(self, table: BlockTable, num_tokens: int) -> int:
        """Tokens of the leading blocks that are complete already."""
        count = 0
        for block in table.block_ids[: (num_tokens - 1) // self._blocks.block_size]:
            if self._generation_of[block] != self._blocks.generations[block]:
                break
            count += self._blocks.block_size
        return count
