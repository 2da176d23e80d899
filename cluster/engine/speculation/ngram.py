"""Prompt lookup: the text goes on as it went on after an earlier occurrence of its last tokens.

No model is asked. It pays where the output copies: code that is edited, documents that are quoted,
answers in a fixed form, loops. Elsewhere it must cost nothing, so guesses are made in silence first: a
sequence speculates only after the last lookups have named the right next token, `needed` times in a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from cluster.engine.sequence import Sequence
from cluster.engine.speculation.ngram_index import NgramIndex

MOST_NEEDED = 8  # right lookups in a row, of a sequence whose drafts have been wrong many times


@dataclass(slots=True)
class _Follower:
    """What is known of one sequence. `source`: where the tokens lie that are expected next."""

    index: NgramIndex
    num_known: int = 0  # tokens at the last lookup
    source: int | None = None
    needed: int = 1
    num_right: int = 0
    was_awaited: bool = False  # the sequence waited for the token that `source` predicts

    def doubt(self) -> None:
        self.needed = min(2 * self.needed, MOST_NEEDED)

    def trust(self) -> None:
        self.needed = max(self.needed // 2, 1)


class NgramProposer:
    """A `Proposer`. Keeps eight bytes for each token of a running sequence."""

    def __init__(self, min_length: int, max_length: int) -> None:
        self._min_length = min_length
        self._max_length = max_length
        self._followers: dict[int, _Follower] = {}  # by identity of the sequence

    def prepare(self, sequences: ListLike[Sequence]) -> None:
        """Nothing is to be prepared."""

    def offer(self, sequence: Sequence, limit: int) -> int:
        follower = self._followers.get(id(sequence))
        if follower is None:
            index = NgramIndex(sequence.token_ids, self._min_length, self._max_length)
            follower = self._followers[id(sequence)] = _Follower(index)
        if follower.num_known != len(sequence.token_ids):
            _look_up(follower, sequence.token_ids)
        if follower.source is None or follower.num_right < follower.needed:
            return 0
        follower.was_awaited = sequence.num_pending_tokens > 0
        return limit

    def propose(self, granted: ListLike[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        return [self._copy(sequence, count) for sequence, count in granted]

    def on_released(self, sequence: Sequence) -> None:
        self._followers.pop(id(sequence), None)

    def on_verified(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        follower = self._followers[id(sequence)]
        if num_accepted:
            follower.trust()
        else:
            follower.doubt()

    def _copy(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """`count` tokens from the source on. A source that reaches the end of the text goes on in the copy
        itself, as in LZ77: a loop of any period is continued for as long as is wanted."""
        source, tokens = self._followers[id(sequence)].source, sequence.token_ids
        assert source is not None
        drafts = list(tokens[source : source + count])
        while len(drafts) < count:
            drafts.append(drafts[source + len(drafts) - len(tokens)])
        return tuple(drafts)


def _look_up(follower: _Follower, tokens: array[int]) -> None:
    """Compare the last prediction with what came, and make the next one."""
    if follower.source is not None:
        if tokens[follower.source] == tokens[follower.num_known]:
            follower.num_right += 1
        else:
            follower.num_right = 0
            if follower.was_awaited:
                follower.doubt()
    follower.was_awaited = False
    follower.num_known = len(tokens)
    follower.source = follower.index.find() if follower.index.catch_up() else None
