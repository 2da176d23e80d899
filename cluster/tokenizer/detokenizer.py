"""Text from tokens as they come, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class IncrementalDetokenizer:
    """Text of one sequence. What `push` returned is final: it never holds half a character.

    The concatenation of all `push`es and the final `flush` equals decoding all tokens at once. Bytes
    that are no UTF-8 become U+FFFD, but only when no later token can complete them.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], skipped: frozenset[int] = frozenset()) -> None:
        self._bytes_of = bytes_of
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often empty in the middle of one."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """Whatever is left at the end of the sequence. Call once."""
        return self._decoder.decode(b"", final=True)
