"""Proposers that know the answer, and checks of what a speculating engine has stored."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike

from cluster.engine.block_hash import BlockHashChain
from cluster.engine.engine import Engine
from cluster.engine.sequence import Sequence
from cluster.engine.speculation.speculator import Speculator
from cluster.types import Request
from tests.unit.engine_fakes import BLOCK_SIZE, VOCAB_SIZE, Outcome

IsRight = Callable[[int, int], bool]  # (position, place among the drafts)


def always(position: int, place: int) -> bool:
    return True


def never(position: int, place: int) -> bool:
    return False


class Oracle:
    """Guesses the tokens of an undisturbed run, where `is_right`, and another token elsewhere; nothing for
    requests of which it was not told."""

    def __init__(self, requests: Iterable[Request], answers: dict[str, Outcome], is_right: IsRight = always) -> None:
        self._texts = {each.request_id: (*each.token_ids, *answers[each.request_id].token_ids) for each in requests}
        self._is_right = is_right
        self.proposals: list[tuple[str, int]] = []  # (request id, drafts)
        self.verified: list[tuple[int, int]] = []  # (drafts, accepted)

    def prepare(self, sequences: ListLike[Sequence]) -> None:
        pass

    def offer(self, sequence: Sequence, limit: int) -> int:
        return limit if sequence.request.request_id in self._texts else 0

    def propose(self, granted: ListLike[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        self.proposals += [(sequence.request.request_id, count) for sequence, count in granted]
        return [self._guess(sequence, count) for sequence, count in granted]

    def on_released(self, sequence: Sequence) -> None:
        pass

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        self.verified.append((num_drafts, num_accepted))

    def _guess(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        text, start = self._texts[sequence.request.request_id], len(sequence.token_ids)
        guess = []
        for place in range(count):
            position = start + place
            right = text[position] if position < len(text) else 0
            guess.append(right if self._is_right(position, place) else (right + 1) % VOCAB_SIZE)
        return tuple(guess)


def speculate_with(engine: Engine, oracle: Oracle, max_tokens: int = 6) -> Oracle:
    engine.scheduler.speculator = Speculator(oracle, max_tokens)
    return oracle


def check_stored(engine: Engine) -> None:
    """The KV of every computed position of a running sequence is that of its token, and its blocks which
    the prefix cache offers are whole."""
    for sequence in engine.scheduler.running:
        assert sequence.table is not None
        tokens = list(sequence.token_ids[: sequence.num_computed_tokens])
        stored = _stored_tokens(engine, list(sequence.table.block_ids))
        assert stored[: len(tokens)] == tokens
        for index, block in enumerate(sequence.table.block_ids):
            if engine.blocks._pool.digest_of[block] is not None:
                span = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                assert stored[span] == list(sequence.token_ids[span]), "a block with other KV is offered"


def check_cached(engine: Engine, texts: Iterable[tuple[int, ...]]) -> int:
    """Blocks that the prefix cache offers for these texts hold their tokens; how many there are."""
    num_found = 0
    for text in texts:
        chain = BlockHashChain(array("i", text), BLOCK_SIZE, b"")
        for index in range(len(text) // BLOCK_SIZE):
            block = engine.blocks._pool.block_of.get(chain.digest(index))
            if block is not None:
                num_found += 1
                assert _stored_tokens(engine, [block]) == list(text[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    return num_found


def _stored_tokens(engine: Engine, blocks: list[int]) -> list[int]:
    return [int(token) for token in engine.kv_cache.layer(1)[blocks, 0, 0, :, 0].flatten().tolist()]
