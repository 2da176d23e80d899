"""Names for the content of full KV blocks: a chain of keyed hashes. Pure Python.

    digest(0) = H(key, tokens of block 0)
    digest(i) = H(key, digest(i-1), tokens of block i)

So a digest names the whole prefix up to the end of its block, and two tenants with different salts
never share one: the salt keys every hash (collisions and timing across tenants: CVE-2025-25183 and
CVE-2025-46570 elsewhere).
"""

from __future__ import annotations

import hashlib
from array import array

DIGEST_BYTES = 16


class BlockHashChain:
    """The digests of one sequence's full blocks, computed when first asked for and kept.

    `token_ids` is the sequence's own growing array: it is read, never copied or changed.
    """

    __slots__ = ("_block_size", "_digests", "_key", "_token_ids")

    def __init__(self, token_ids: array[int], block_size: int, salt: bytes) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        # A salt of any length becomes a key of the length that blake2b takes.
        self._key = hashlib.blake2b(salt, digest_size=32, person=b"tandem-kv-salt").digest()
        self._digests: list[bytes] = []

    def digest(self, block_index: int) -> bytes:
        """Digest of block `block_index`, all of whose tokens must be known."""
        digests = self._digests
        while len(digests) <= block_index:
            start = len(digests) * self._block_size
            tokens = self._token_ids[start : start + self._block_size]
            assert len(tokens) == self._block_size, "only full blocks have a digest"
            hasher = hashlib.blake2b(key=self._key, digest_size=DIGEST_BYTES)
            if digests:
                hasher.update(digests[-1])
            hasher.update(tokens.tobytes())
            digests.append(hasher.digest())
        return digests[block_index]
