"""The host's copies of block tables follow every change of a table."""

from __future__ import annotations

from cluster.engine.block_manager import BlockManager
from cluster.engine.gpu.block_rows import BlockRows
from cluster.engine.sequence import Sequence, make_sequence
from tests.unit.engine_fakes import make_request

SIZE = 16


def sequence_with(blocks: BlockManager, num_tokens: int) -> Sequence:
    request = make_request("a", tuple(range(num_tokens)))
    sequence = make_sequence(request, block_size=SIZE, max_model_len=500, eos_token_ids=(), is_loaded=False)
    sequence.table = blocks.allocate(sequence.chain, num_tokens, 0)
    return sequence


def test_a_table_that_shrank_and_grew_to_its_old_length_is_copied_anew() -> None:
    """Drafts across a block boundary that are rejected, twice: the second time another block comes."""
    blocks, rows = BlockManager(8, SIZE), BlockRows(4, 16, SIZE)
    sequence = sequence_with(blocks, 2 * SIZE - 2)
    assert sequence.table is not None
    for num_tokens in (2 * SIZE - 1, 2 * SIZE):
        assert blocks.grow(sequence.table, 2 * SIZE + 3)
        [row] = rows.gather(rows.update([sequence]), len(sequence.table.block_ids)).tolist()
        assert row == list(sequence.table.block_ids)
        blocks.shrink(sequence.table, num_tokens)
