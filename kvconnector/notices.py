"""What a reader tells the owner of leased blocks, as a transport notification. Best effort: a lost one
costs a lease its time, never correctness.

A notice carries the handle's nonce, which only the holder of a ticket knows.
"""

from __future__ import annotations

import msgspec

MAX_NOTICE_BYTES = 512


class Renew(msgspec.Struct, frozen=True, tag="renew", forbid_unknown_fields=True):
    """The reader is alive and still wants the blocks."""

    request_id: str
    attempt: int
    nonce: bytes


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """The reader has what it needs, or has given up."""

    request_id: str
    attempt: int
    nonce: bytes


Notice = Renew | Done

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Notice] = msgspec.msgpack.Decoder(Notice)


def encode(notice: Notice) -> bytes:
    return _encoder.encode(notice)


def decode(message: bytes) -> Notice | None:
    """None for what is no notice: it is dropped, like one that was lost."""
    if len(message) > MAX_NOTICE_BYTES:
        return None
    try:
        return _decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError):  # the latter of text that is no UTF-8
        return None
