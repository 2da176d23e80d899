"""Tickets: only holders of the key can seal, every field is bounded, each is used once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TicketInvalid
from cluster.types import KVHandle
from kvconnector import notices
from kvconnector.ticket import MAC_BYTES, MAGIC, UsedNonces, _mac, open_ticket, seal

KEY = b"k" * 32


def make_handle(**changes: Any) -> KVHandle:
    fields: dict[str, Any] = {
        "engine_id": "prefill-1",
        "request_id": "r1",
        "attempt": 0,
        "endpoint": "127.0.0.1:1234",
        "num_tokens": 33,
        "block_size": 16,
        "block_ids": (4, 9, 2),
        "generations": (1, 7, 3),
        "lease_s": 30.0,
        "nonce": b"n" * 16,
    }
    return KVHandle(**fields | changes)


def test_seal_and_open() -> None:
    assert open_ticket(seal(make_handle(), KEY), KEY) == make_handle()


def test_another_key_is_refused() -> None:
    with pytest.raises(TicketInvalid, match="not sealed"):
        open_ticket(seal(make_handle(), KEY), b"x" * 32)


def test_a_short_key_is_refused_when_sealing() -> None:
    with pytest.raises(ValueError, match="cluster key"):
        seal(make_handle(), b"short")


@given(st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    ticket = bytearray(seal(make_handle(), KEY))
    at = data.draw(st.integers(0, len(ticket) - 1))
    ticket[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TicketInvalid):
        open_ticket(bytes(ticket), KEY)


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: MAGIC + tail))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(TicketInvalid):
        open_ticket(garbage, KEY)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("engine_id", {"engine_id": ""}),
        ("request_id", {"request_id": "x" * 257}),
        ("attempt", {"attempt": -1}),
        ("num_tokens", {"num_tokens": 0}),
        ("num_tokens", {"num_tokens": 1 << 21}),
        ("block_size", {"block_size": 0}),
        ("block_ids", {"block_ids": (1, 2)}),
        ("block_ids", {"block_ids": (1, 2, -3)}),
        ("block_ids", {"block_ids": (1, 2, 2)}),
        ("generations", {"generations": (1, 2)}),
        ("generations", {"generations": (1, 2, 0)}),
        ("lease_s", {"lease_s": float("nan")}),
        ("lease_s", {"lease_s": float("inf")}),
        ("lease_s", {"lease_s": 0.0}),
        ("nonce", {"nonce": b"n"}),
    ],
)
def test_a_sealed_ticket_with_a_field_out_of_bounds_is_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(TicketInvalid, match=field):
        open_ticket(seal(make_handle(**changes), KEY), KEY)


def test_a_sealed_body_of_another_shape_is_refused() -> None:
    class Other(msgspec.Struct):
        anything: int

    with pytest.raises(TicketInvalid, match="malformed"):
        open_ticket(seal(Other(1), KEY), KEY)  # type: ignore[arg-type]


def test_a_nonce_is_good_once_and_memory_is_bounded() -> None:
    used = UsedNonces(capacity=2)
    first, second, third = (make_handle(nonce=bytes([at]) * 16) for at in range(3))
    used.claim(first, now=0.0)
    with pytest.raises(TicketInvalid, match="used before"):
        used.claim(first, now=59.0)
    used.claim(second, now=50.0)
    used.claim(third, now=55.0)  # a worker with many hand-overs refuses none: the oldest is forgotten
    assert len(used) == 2
    with pytest.raises(TicketInvalid, match="used before"):
        used.claim(second, now=60.0)


def test_a_sealed_body_with_text_that_is_none_is_refused() -> None:
    good = seal(make_handle(engine_id="prefill"), KEY)
    body = good[len(MAGIC) + MAC_BYTES :].replace(b"prefill", b"pref\xffll")
    assert body not in good
    with pytest.raises(TicketInvalid, match="malformed"):
        open_ticket(MAGIC + _mac(body, KEY) + body, KEY)
    notice = notices.encode(notices.Done("request", 0, b"n" * 16)).replace(b"request", b"requ\xffst")
    assert notices.decode(notice) is None, "a peer's bytes must not end the engine's thread"
