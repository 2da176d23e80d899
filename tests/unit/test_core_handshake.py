"""The comparison of identities, and a decode worker's view of a peer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvconnector.core.handshake import (
    Ask,
    Compatible,
    Disconnect,
    Failed,
    FieldMismatch,
    KVIdentity,
    PeerEvent,
    PeerPhase,
    PeerState,
    Refused,
    TellConnected,
    TellFailed,
    TellRefused,
    Tick,
    TransportBroke,
    Wanted,
    common_version,
    compare,
    step,
)

OURS = KVIdentity(
    config_digest="c",
    weights_digest="w",
    kv_dtype="bfloat16",
    attention_kind="gqa",
    num_layers=30,
    num_kv_heads=3,
    head_size=64,
    rope="r",
    kv_layout="NL2HSD",
    numeric_fingerprint="f",
    transports=("nixl",),
)


def test_equal_identities_are_compatible() -> None:
    assert compare(OURS, OURS) == ()
    assert common_version(OURS, OURS) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config_digest", "x"),
        ("weights_digest", "x"),
        ("revision", "x"),
        ("quantisation", "Q4_1"),
        ("adapters", ("lora",)),
        ("weight_version", "2"),
        ("kv_dtype", "float16"),
        ("attention_kind", "mla"),
        ("num_layers", 31),
        ("num_kv_heads", 1),
        ("head_size", 128),
        ("rope", "x"),
        ("kv_layout", "LN2HSD"),
        ("invariant", False),
        ("numeric_fingerprint", "x"),
        ("transports", ("loopback",)),
    ],
)
def test_each_differing_field_is_named_with_both_values(field: str, value: Any) -> None:
    theirs = msgspec.structs.replace(OURS, **{field: value})
    [found] = compare(OURS, theirs)
    assert found.field == field
    assert found.ours != found.theirs
    assert compare(theirs, OURS) == (FieldMismatch(field, found.theirs, found.ours),)


def test_no_field_of_an_identity_is_forgotten() -> None:
    """A field that is added must be compared, or said here not to be."""
    compared_otherwise = {"numeric_fingerprint", "transports", "protocol_min", "protocol_max"}
    from kvconnector.core import handshake

    assert {*handshake._EQUAL_FIELDS, *compared_otherwise} == set(KVIdentity.__struct_fields__)


def test_all_differences_are_listed() -> None:
    theirs = msgspec.structs.replace(OURS, weights_digest="x", head_size=1, numeric_fingerprint="y")
    assert [each.field for each in compare(OURS, theirs)] == ["weights_digest", "head_size", "numeric_fingerprint"]


def test_unknown_digests_and_fingerprints_pair_with_nothing() -> None:
    unknown = msgspec.structs.replace(OURS, weights_digest="", numeric_fingerprint="")
    assert [each.field for each in compare(unknown, unknown)] == ["weights_digest", "numeric_fingerprint"]
    loose = msgspec.structs.replace(OURS, invariant=False, numeric_fingerprint="")
    assert compare(loose, loose) == ()


def test_version_ranges_must_overlap() -> None:
    newer = msgspec.structs.replace(OURS, protocol_min=2, protocol_max=4)
    assert compare(OURS, newer) == (FieldMismatch("protocol_version", "1-1", "2-4"),)
    both = msgspec.structs.replace(OURS, protocol_min=1, protocol_max=3)
    assert common_version(both, newer) == 3


SHAKING = PeerState(PeerPhase.SHAKING, until=5.0)
MISMATCHES = (FieldMismatch("rope", "a", "b"),)


@pytest.mark.parametrize(
    ("state", "event", "now", "phase", "effects"),
    [
        (PeerState(), Wanted(), 0.0, PeerPhase.SHAKING, (Ask(),)),
        (SHAKING, Wanted(), 1.0, PeerPhase.SHAKING, ()),  # asked once for all that wait
        (SHAKING, Compatible(), 1.0, PeerPhase.CONNECTED, (TellConnected(),)),
        (PeerState(PeerPhase.CONNECTED), Wanted(), 9.0, PeerPhase.CONNECTED, (TellConnected(),)),
        (SHAKING, Refused(MISMATCHES), 1.0, PeerPhase.REFUSED, (TellRefused(MISMATCHES),)),
        (SHAKING, Failed("x"), 1.0, PeerPhase.UNKNOWN, (TellFailed("x"),)),
        (SHAKING, Tick(), 4.9, PeerPhase.SHAKING, ()),
        (PeerState(), Compatible(), 9.0, PeerPhase.UNKNOWN, ()),  # after its timeout
        (PeerState(PeerPhase.CONNECTED), TransportBroke(), 9.0, PeerPhase.UNKNOWN, (Disconnect(),)),
        (PeerState(PeerPhase.CONNECTED), Compatible(), 9.0, PeerPhase.CONNECTED, ()),  # a duplicate
    ],
)
def test_transitions(
    state: PeerState, event: PeerEvent, now: float, phase: PeerPhase, effects: tuple[object, ...]
) -> None:
    after, done = step(state, event, now)
    assert (after.phase, done) == (phase, effects)


def test_a_silent_peer_is_given_up_and_may_be_asked_again() -> None:
    state, effects = step(SHAKING, Tick(), 5.0)
    assert isinstance(effects[0], TellFailed)
    assert step(state, Wanted(), 5.1)[1] == (Ask(),)


def test_a_refusal_is_remembered_for_a_while() -> None:
    refused, _ = step(SHAKING, Refused(MISMATCHES), 1.0)
    assert step(refused, Wanted(), 30.0)[1] == (TellRefused(MISMATCHES),)
    assert step(refused, Wanted(), 31.5)[1] == (Ask(),)
