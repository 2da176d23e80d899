"""Where did the last few tokens of a text occur before? Pure lookups in bounded time.

Hash chains, as in LZ77 compressors: `head[h]` is the last position at which an n-gram of hash h ended,
`previous[p]` the one before position p. Eight bytes per token, whatever n is; different n-grams of one
hash are told apart by comparing tokens.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

MAX_CANDIDATES = 16  # earlier places that one lookup compares
MAX_NEW_TOKENS = 1 << 14  # taken in by one call, about a millisecond's work
_SMALLEST_TABLE, _LARGEST_TABLE = 10, 17  # bits
_FEW = 32  # below it, single steps are faster than NumPy's
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class NgramIndex:
    """Follows `token_ids`, a sequence's own growing array: read, never copied or changed."""

    def __init__(self, token_ids: array[int], min_length: int, max_length: int) -> None:
        self._token_ids = token_ids
        self._min_length = min_length
        self._max_length = max_length
        bits = min(max(len(token_ids).bit_length(), _SMALLEST_TABLE), _LARGEST_TABLE)
        self._shift = 64 - bits
        self._head = array("i", [-1]) * (1 << bits)
        self._previous = array("i")  # by position; its length is how many tokens were taken in

    def catch_up(self) -> bool:
        """Take in tokens that are new; False if there are more than one call may."""
        num_new = len(self._token_ids) - len(self._previous)
        if num_new > _FEW:
            self._take_in_many(min(num_new, MAX_NEW_TOKENS))
        else:
            for position in range(len(self._previous), len(self._token_ids)):
                self._take_in(position)
        return num_new <= MAX_NEW_TOKENS

    def find(self) -> int | None:
        """The position behind the best earlier occurrence of the newest tokens; all tokens must have been
        taken in. None if not even the last `min_length` of them occurred before.

        The longest match wins, up to `max_length` tokens, because what precedes a place tells more about
        what follows it than anything else; among equals the most recent: texts are local, and an edited
        copy or a loop goes on as it did last time.
        """
        tokens, end = self._token_ids, len(self._token_ids) - 1
        best_length, best = self._min_length - 1, -1
        candidate = self._previous[end]
        for _ in range(MAX_CANDIDATES):
            if candidate < 0:
                break
            length = 0
            limit = min(self._max_length, candidate + 1)
            while length < limit and tokens[candidate - length] == tokens[end - length]:
                length += 1
            if length > best_length:
                best_length, best = length, candidate
                if length == self._max_length:
                    break
            candidate = self._previous[candidate]
        return best + 1 if best >= 0 else None

    def _take_in(self, position: int) -> None:
        if position < self._min_length - 1:
            self._previous.append(-1)
            return
        digest = 0
        for place in range(position - self._min_length + 1, position + 1):
            digest = ((digest + self._token_ids[place] + 1) * _MULTIPLIER) & _MASK
        bucket = digest >> self._shift
        self._previous.append(self._head[bucket])
        self._head[bucket] = position

    def _take_in_many(self, count: int) -> None:
        """The same for `count` tokens at once: positions of one bucket are linked in ascending order."""
        start = len(self._previous)
        first = max(start, self._min_length - 1)
        buckets = self._buckets(first, start + count)
        order = np.argsort(buckets, kind="stable")
        ordered = buckets[order]
        head = np.frombuffer(self._head, np.int32)
        links = head[ordered]
        is_same = ordered[1:] == ordered[:-1]
        links[1:][is_same] = (order[:-1] + first)[is_same]
        previous = np.full(start + count - first, -1, np.int32)
        previous[order] = links
        is_last = np.append(~is_same, True)
        head[ordered[is_last]] = order[is_last] + first
        self._previous.extend([-1] * (first - start))
        self._previous.frombytes(previous.tobytes())

    def _buckets(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Of the n-grams that end at positions `first` ... `stop` - 1."""
        length = self._min_length
        tokens = np.frombuffer(self._token_ids, np.int32)[first - length + 1 : stop].astype(np.uint64)
        digests = np.zeros(stop - first, np.uint64)
        for place in range(length):
            digests = (digests + tokens[place : place + stop - first] + np.uint64(1)) * np.uint64(_MULTIPLIER)
        return (digests >> np.uint64(self._shift)).astype(np.int64)
