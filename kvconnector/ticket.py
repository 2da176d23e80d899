"""Sealing a KVHandle for its way through the router: version, HMAC-SHA256 under the cluster key, msgpack.

    b"TKV1" | 32 bytes HMAC over b"tandem kv handle v1" + body | body

Nothing of a ticket is decoded before its signature holds, and no field is used before its bounds hold.
A ticket is for one use per decode worker (`UsedNonces`); what outlives that is fenced by engine_id,
generations and digests.
"""

from __future__ import annotations

import hashlib
import hmac
import math

import msgspec

from cluster.errors import TicketInvalid
from cluster.types import KVHandle

MAGIC = b"TKV1"
MAC_BYTES = 32
NONCE_BYTES = 16
MIN_KEY_BYTES = 16
MAX_TICKET_BYTES = 2 << 20
MAX_TOKENS = 1 << 20
MAX_BLOCK_SIZE = 4096
MAX_LEASE_S = 3600.0
MAX_TEXT = 256
_DOMAIN = b"tandem kv handle v1"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KVHandle)


def seal(handle: KVHandle, key: bytes) -> bytes:
    """The opaque bytes that a router carries."""
    body = _encoder.encode(handle)
    return MAGIC + _mac(body, key) + body


def open_ticket(ticket: bytes, key: bytes) -> KVHandle:
    """The handle, if a holder of `key` sealed it and every field is within bounds; else `TicketInvalid`."""
    if len(ticket) > MAX_TICKET_BYTES:
        raise TicketInvalid(f"the ticket has {len(ticket)} bytes, at most {MAX_TICKET_BYTES} are allowed")
    body_start = len(MAGIC) + MAC_BYTES
    body = ticket[body_start:]
    if not ticket.startswith(MAGIC) or not hmac.compare_digest(ticket[len(MAGIC) : body_start], _mac(body, key)):
        raise TicketInvalid("the ticket was not sealed with this cluster's key")
    try:
        handle = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TicketInvalid(f"the ticket is sealed but malformed: {error}") from error
    _check(handle)
    return handle


def _mac(body: bytes, key: bytes) -> bytes:
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"the cluster key has {len(key)} bytes, at least {MIN_KEY_BYTES} are needed")
    return hmac.new(key, _DOMAIN + body, hashlib.sha256).digest()


def _check(handle: KVHandle) -> None:
    for field in ("engine_id", "request_id", "endpoint", "weight_version"):
        text = getattr(handle, field)
        _require(field, len(text) <= MAX_TEXT and (bool(text) or field == "weight_version"), f"length {len(text)}")
    _require("attempt", 0 <= handle.attempt < 1 << 32, handle.attempt)
    _require("num_tokens", 1 <= handle.num_tokens <= MAX_TOKENS, handle.num_tokens)
    _require("block_size", 1 <= handle.block_size <= MAX_BLOCK_SIZE, handle.block_size)
    num_blocks = -(-handle.num_tokens // handle.block_size)
    _require("block_ids", len(handle.block_ids) == num_blocks, f"{len(handle.block_ids)} blocks, {num_blocks} needed")
    _require("block_ids", all(0 <= block < 1 << 31 for block in handle.block_ids), "an id out of range")
    _require("block_ids", len(set(handle.block_ids)) == num_blocks, "a block twice")
    _require("generations", len(handle.generations) == num_blocks, f"{len(handle.generations)} for {num_blocks} blocks")
    _require("generations", all(0 < value < 1 << 62 for value in handle.generations), "a value out of range")
    _require("lease_s", math.isfinite(handle.lease_s) and 0 < handle.lease_s <= MAX_LEASE_S, handle.lease_s)
    _require("nonce", len(handle.nonce) == NONCE_BYTES, f"{len(handle.nonce)} bytes")


def _require(field: str, holds: bool, found: object) -> None:
    if not holds:
        raise TicketInvalid(f"the ticket's {field} is out of bounds: {found}")


class UsedNonces:
    """Makes tickets single-use: a nonce is remembered for as long as its lease may live. The caller gives
    the time. Bounded: beyond `capacity` the oldest are forgotten, for a busy worker must not refuse good tickets; one
    that is used again then still meets generations and digests."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self._capacity = capacity
        self._expiry: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._expiry)

    def claim(self, handle: KVHandle, now: float) -> None:
        """Raises `TicketInvalid` if the handle was claimed before."""
        if self._expiry.get(handle.nonce, -math.inf) > now:
            raise TicketInvalid(f"the ticket of request {handle.request_id} was used before")
        self._expiry.pop(handle.nonce, None)
        while len(self._expiry) >= self._capacity:
            del self._expiry[next(iter(self._expiry))]
        # Renewals prolong a lease beyond lease_s; twice that covers the longest load a worker allows.
        self._expiry[handle.nonce] = now + 2 * handle.lease_s
