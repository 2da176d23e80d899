"""The hand-over between a prefill and a decode worker: same tokens, nothing leaked, every failure named.

Numbers in names are the reports of the same trouble elsewhere (docs: protocol, "bugs of the anchors").
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cluster.control.messages import Cancel, Submit
from cluster.types import FinishReason, PrefillResult, PrefillStarted, Request, TokenChunk
from decode.admission import MAX_LOADS_READING
from decode.reads import SETTLE_S, STALL_S
from kvconnector import notices
from kvconnector.base import PeerId, TransferState
from kvconnector.core.load import LoadPhase
from kvconnector.ticket import open_ticket, seal
from tests.integration.handover_harness import IDENTITY, KEY, LEASE_S, Pair, continued, prompt

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 48, 64, 95, 96, 150)


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(16, 16), (32, 16), (16, 32), (48, 16), (16, 48)])
def test_tokens_are_those_of_one_worker_vllm_50558(prefill_size: int, decode_size: int) -> None:
    pair = Pair(prefill_block_size=prefill_size, decode_block_size=decode_size, chunk=24)
    for length in LENGTHS:
        request = prompt(f"r{length}", length, seed=length)
        assert pair.split(request) == pair.alone(request), length
        pair.assert_nothing_held()
    assert pair.decode.counters.kv_transfers >= len(LENGTHS)
    assert pair.decode.counters.kv_transfer_failures == 0


def test_many_at_once() -> None:
    pair = Pair()
    requests = [prompt(f"r{at}", 10 + 11 * at, seed=at) for at in range(12)]
    results = [pair.compute(request) for request in requests]
    for request, result in zip(requests, results, strict=True):
        pair.start_decode(request, result)
    pair.run()
    for request, result in zip(requests, results, strict=True):
        assert [*result.first.token_ids, *pair.tokens(request.request_id)] == pair.alone(request)
    pair.assert_nothing_held()


def test_what_decode_has_is_not_read_again() -> None:
    pair = Pair()
    pair.split(prompt("first", 100))
    pulled = pair.decode.counters.kv_bytes_pulled
    request = prompt("second", 100)
    assert pair.split(request) == pair.alone(request)
    assert pair.decode.counters.kv_bytes_pulled - pulled < pulled / 4
    pair.assert_nothing_held()


def test_digests_are_equal_on_both_sides() -> None:
    pair = Pair(prefill_block_size=32, decode_block_size=16)
    request = prompt("r", 100)
    pair.split(request)
    ours = pair.inspect(pair.prefill.driver, request.token_ids)
    theirs = pair.inspect(pair.decode, request.token_ids[:96])
    assert ours.num_digest_tokens == theirs.num_digest_tokens == 96
    assert ours.kv_digests == theirs.kv_digests
    assert ours.kv_digests != (0,)


def test_decode_may_begin_while_the_prompt_is_computed() -> None:
    pair = Pair(chunk=16)
    request = prompt("r", 100)
    expected = pair.alone(request)
    pair.prefill.driver.handle(Submit(request, None), pair.now)
    pair.turn(decode=False)
    assert isinstance(pair.events["r"][0], PrefillStarted)
    handle = pair.handle_of("r")
    first = make_first(expected[0])
    pair.send(Submit(continued(request, first), handle))
    pair.turn(prefill=False)
    pair.turn(prefill=False)
    pair.run()
    assert pair.tokens("r") == expected[1:]
    pair.assert_nothing_held()


def make_first(token: int) -> TokenChunk:
    return TokenChunk(request_id="r", attempt=0, index=0, token_ids=(token,))


# ---- failures: the policy decides, the bits do not change


def corrupt(pair: Pair) -> None:
    """Change one stored number on the prefill side, after its digest was taken."""
    kv = pair.prefill.driver.engine.kv_cache.kv_NL2HSD
    kv[:, 1, 0, 0, 3, 0] += 1


def test_corrupt_data_is_noticed_and_recomputed() -> None:
    pair = Pair()
    request = prompt("r", 50)
    result = pair.compute(request)
    corrupt(pair)
    pair.start_decode(request, result)
    pair.run()
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    pair.assert_nothing_held()


def test_corrupt_data_is_an_error_if_the_policy_says_so() -> None:
    pair = Pair(on_failure="fail")
    request = prompt("r", 50)
    result = pair.compute(request)
    corrupt(pair)
    pair.start_decode(request, result)
    pair.run()
    assert pair.error_code("r") == "digest_mismatch"
    pair.assert_nothing_held()


@pytest.mark.parametrize("on_failure", ["recompute", "fail"])
def test_reused_blocks_are_rejected_vllm_52234(on_failure: str) -> None:
    pair = Pair(prefill_blocks=16, on_failure=on_failure)  # type: ignore[arg-type]
    request = prompt("r", 200)
    result = pair.compute(request)
    pair.advance(LEASE_S + 1)
    pair.turn(decode=False)
    assert pair.prefill.driver.counters.kv_leases_expired == 1
    pair.compute(prompt("other", 200, seed=5))  # takes the same blocks
    pair.start_decode(request, result)
    pair.run()
    if on_failure == "fail":
        assert pair.error_code("r") == "lease_expired"
    else:
        assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    pair.release(prompt("other", 200))
    pair.run()
    pair.assert_nothing_held()


def test_prefill_that_dies_vllm_46283() -> None:
    pair = Pair()
    warm, request = prompt("warm", 40, seed=9), prompt("r", 150)
    pair.split(warm)
    result = pair.compute(request)
    pair.start_decode(request, result)
    pair.hub.is_stalled = True
    pair.turn(prefill=False)
    pair.hub.transports.pop("prefill-1")
    pair.hub.is_stalled = False
    for _ in range(500):
        pair.turn(prefill=False)
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    assert pair.decode.counters.kv_transfer_failures == 1
    del pair.prefills["prefill-1"]
    assert pair.inspect(pair.decode).num_draining > 0, "pieces of the READ may be on their way"
    pair.advance(SETTLE_S)
    pair.run()
    pair.assert_nothing_held()


def test_restarted_prefill_is_another_peer_vllm_58063_49238() -> None:
    pair = Pair()
    pair.split(prompt("r1", 40))
    old, stale = pair.prefill, pair.compute(prompt("stale", 60, seed=3))
    pair.hub.transports.pop("prefill-1")
    del pair.prefills["prefill-1"]
    pair.prefill = pair.add_prefill("prefill-2")
    request = prompt("r2", 50, seed=4)
    assert pair.split(request) == pair.alone(request)
    assert PeerId(old.engine_id) not in pair.decode._transport._peers  # type: ignore[attr-defined]
    pair.start_decode(prompt("stale", 60, seed=3), stale)  # its ticket is of the old process
    pair.run()
    assert [*stale.first.token_ids, *pair.tokens("stale")] == pair.alone(prompt("stale", 60, seed=3))
    pair.assert_nothing_held()


def test_unanswered_handshake_is_bounded_and_not_remembered_sglang_13054() -> None:
    pair = Pair(on_failure="fail")
    request = prompt("r", 20)
    result = pair.compute(request)
    pair.answers_handshakes = False
    pair.start_decode(request, result)
    pair.run()
    pair.advance(6.0)
    pair.run()
    assert pair.error_code("r") == "transfer_failed"
    pair.answers_handshakes = True
    again = prompt("again", 20)
    assert pair.split(again) == pair.alone(again)
    pair.release(request)
    pair.run()
    pair.assert_nothing_held()


def test_mismatch_is_refused_by_name_and_harms_nobody_vllm_23587() -> None:
    pair = Pair()
    pair.prefill.identity = msgspec.structs.replace(IDENTITY, weights_digest="other", head_size=8)
    request = prompt("r", 20)
    result = pair.compute(request)
    pair.start_decode(request, result)
    pair.run()
    assert pair.error_code("r") == "handshake_mismatch"
    error = pair.chunks("r")[0].error
    assert error is not None
    assert "weights_digest (ours other, theirs w)" in error.message
    assert "head_size (ours 8, theirs 4)" in error.message
    assert pair.decode.counters.handshake_refusals == 1
    pair.release(request)
    pair.run()
    pair.assert_nothing_held()


# ---- cancellation, at every stage


def test_cancel_while_shaking_hands() -> None:
    pair = Pair()
    pair.answers_handshakes = False
    request = prompt("r", 20)
    pair.start_decode(request, pair.compute(request))
    pair.turn()
    pair.cancel(request)
    pair.run()
    assert pair.chunks("r")[-1].finish_reason is FinishReason.CANCELLED
    pair.release(request)
    pair.run()
    pair.assert_nothing_held()


def test_cancel_while_waiting_for_blocks() -> None:
    pair = Pair(decode_blocks=16)
    blocker = prompt("blocker", 200, max_tokens=50)
    pair.send(Submit(blocker, None))
    for _ in range(8):
        pair.turn()
    request = prompt("r", 150, seed=2)
    pair.start_decode(request, pair.compute(request))
    for _ in range(3):
        pair.turn()
    [load] = pair.decode._admission._loads.values()
    assert load.state.phase is LoadPhase.WAITING
    pair.cancel(request)
    pair.run()
    assert [chunk.finish_reason for chunk in pair.chunks("r")] == [FinishReason.CANCELLED]
    assert len(pair.tokens("blocker")) == 50
    pair.assert_nothing_held()


def with_stalled_reads() -> tuple[Pair, Request, PrefillResult]:
    """A prompt of 100 tokens whose READs neither end nor fail while `hub.is_stalled`."""
    pair = Pair()
    request = prompt("r", 100)
    result = pair.compute(request)
    pair.hub.is_stalled = True
    pair.start_decode(request, result)
    return pair, request, result


def assert_recomputed_and_blocks_kept(pair: Pair, request: Request, result: PrefillResult) -> None:
    """Kept until nothing can land."""
    pair.run(turns=300)
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    assert pair.inspect(pair.decode).num_draining == 7
    pair.hub.is_stalled = False
    pair.run()
    pair.assert_nothing_held()


def test_cancel_while_reading_keeps_the_blocks_until_nothing_can_land_sglang_35049() -> None:
    pair, request, _ = with_stalled_reads()
    for _ in range(3):
        pair.turn()
    pair.cancel(request)
    pair.run(turns=60)
    assert [chunk.finish_reason for chunk in pair.chunks("r")] == [FinishReason.CANCELLED]
    inspection = pair.inspect(pair.decode)
    assert inspection.num_draining == 7
    assert inspection.num_free + inspection.num_draining == inspection.num_blocks
    pair.hub.is_stalled = False
    pair.run()
    pair.assert_nothing_held()


def test_a_slow_read_is_given_up_and_recomputed_but_its_blocks_are_kept() -> None:
    pair, request, result = with_stalled_reads()
    pair.turn()
    pair.advance(25.0)
    assert_recomputed_and_blocks_kept(pair, request, result)


def test_a_read_that_stands_still_is_given_up_long_before_the_hand_over_is() -> None:
    """A prefill worker that was paused while its KV was read: its streams were silent until the deadline."""
    pair, request, result = with_stalled_reads()
    began = pair.now
    while not pair.tokens_so_far("r"):
        pair.advance(0.5)
        pair.turn(prefill=False)
        assert pair.now < began + STALL_S + 2.0
    assert pair.now > began + STALL_S
    assert_recomputed_and_blocks_kept(pair, request, result)


def test_a_step_that_takes_long_is_no_standstill() -> None:
    pair, request, result = with_stalled_reads()
    pair.turn(prefill=False)
    pair.advance(STALL_S + 3.0)
    pair.turn(prefill=False)
    pair.hub.is_stalled = False
    pair.run()
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    assert pair.decode.counters.kv_loads_failed == 0
    pair.assert_nothing_held()


def test_a_peer_that_hangs_takes_no_landing_rows_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loads fail in time, and their READs may stand for as long as it does."""
    pair = Pair(decode_blocks=512, prefill_blocks=512)
    healthy = pair.add_prefill("prefill-2", num_blocks=256)
    healthy.driver.endpoint = "prefill:2"
    transport = pair.decode._transport
    plain = transport.poll

    def poll(handle: Any) -> TransferState:
        stands = transport._reads[handle][0] == "prefill-1"  # type: ignore[attr-defined]
        return TransferState.RUNNING if stands else plain(handle)

    monkeypatch.setattr(transport, "poll", poll)
    hanging = [prompt(f"h{index}", 40, seed=index) for index in range(MAX_LOADS_READING)]
    for request, result in [(request, pair.compute(request)) for request in hanging]:
        pair.start_decode(request, result)
    for _ in range(50):
        pair.advance(0.5)
        pair.turn()
    pair.run()
    assert all(pair.tokens_so_far(request.request_id) for request in hanging), "recomputed"
    request = prompt("other", 40, seed=77)
    result = pair.compute(request, healthy)
    began, pulled = pair.now, pair.decode.counters.kv_bytes_pulled
    pair.start_decode(request, result)
    while not pair.tokens_so_far("other"):
        pair.advance(0.1)
        pair.turn()
        assert pair.now < began + 2.0
    assert pair.decode.counters.kv_bytes_pulled > pulled


def test_a_sequence_that_waits_is_not_starved_by_loads_that_came_later() -> None:
    """A prompt that must be computed here, or was preempted: every block that gets free would go to the next load."""
    pair = Pair(decode_blocks=16)
    pair.decode.engine._clock = lambda: pair.now
    live: set[str] = set()
    count = 0

    def load_another() -> None:
        nonlocal count
        request = prompt(f"s{count}", 40, seed=count, max_tokens=20)
        count += 1
        pair.start_decode(request, pair.compute(request))
        live.add(request.request_id)

    for _ in range(4):
        load_another()
    for _ in range(5):
        pair.turn(prefill=False)
    pair.send(Submit(prompt("long", 200, seed=9, max_tokens=4), None))
    while not pair.tokens_so_far("long"):
        pair.turn(prefill=False)
        live -= {each for each in live if any(chunk.finish_reason for chunk in pair.chunks(each))}
        while len(live) < 4:
            load_another()
        assert count < 60
    pair.run()
    pair.assert_nothing_held()


def test_cancel_during_and_after_prefill() -> None:
    pair = Pair(chunk=16)
    during, after = prompt("during", 150), prompt("after", 50)
    pair.prefill.driver.handle(Submit(during, None), pair.now)
    pair.turn()
    pair.prefill.driver.handle(Cancel("during", 0), pair.now)
    pair.run()
    results = [event for event in pair.events["during"] if isinstance(event, PrefillResult)]
    assert [result.first.finish_reason for result in results] == [FinishReason.CANCELLED]
    assert pair.compute(after).kv is not None
    pair.prefill.driver.handle(Cancel("after", 0), pair.now)  # crossed with the result
    pair.run()
    pair.assert_nothing_held()


# ---- leases


def test_lease_ends_without_new_traffic_trtllm_12313() -> None:
    pair = Pair()
    pair.compute(prompt("r", 50))
    assert pair.inspect(pair.prefill.driver).num_leased == 4
    pair.advance(LEASE_S + 0.5)
    pair.turn()
    assert pair.prefill.driver.counters.kv_leases_expired == 1
    pair.assert_nothing_held()


def test_lease_is_renewed_while_decode_waits() -> None:
    pair = Pair(decode_blocks=16)
    pair.split(prompt("warm", 20, seed=8))
    blocker = prompt("blocker", 200, max_tokens=50)
    pair.send(Submit(blocker, None))
    for _ in range(8):
        pair.turn()
    request = prompt("r", 150, seed=2)
    result = pair.compute(request)
    pair.start_decode(request, result)
    for _ in range(4):
        pair.turn()
        pair.advance(LEASE_S / 3)
    pair.turn()
    assert pair.prefill.driver.counters.kv_leases_expired == 0
    pair.run()
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    pair.assert_nothing_held()


def test_request_that_ends_with_its_first_token_leases_nothing() -> None:
    pair = Pair()
    result = pair.compute(prompt("r", 50, max_tokens=1))
    assert result.kv is None
    assert result.first.finish_reason is FinishReason.LENGTH
    pair.assert_nothing_held()


def test_release_is_idempotent() -> None:
    pair = Pair()
    request = prompt("r", 50)
    pair.compute(request)
    pair.release(request)
    pair.release(request)
    pair.assert_nothing_held()


def test_notices_without_the_nonce_or_sense_are_ignored() -> None:
    pair = Pair()
    pair.compute(prompt("r", 50))
    pair.decode._transport.notify(PeerId("prefill-1"), b"garbage")
    pair.decode._transport.notify(PeerId("prefill-1"), notices.encode(notices.Done("r", 0, b"")).replace(b"r", b"\xff"))
    pair.decode._transport.notify(PeerId("prefill-1"), notices.encode(notices.Done("r", 0, b"x" * 16)))
    pair.decode._transport.notify(PeerId("prefill-1"), notices.encode(notices.Done("unknown", 0, b"x" * 16)))
    pair.run()
    assert pair.inspect(pair.prefill.driver).num_leases == 1
    pair.release(prompt("r", 50))
    pair.assert_nothing_held()


# ---- tickets


def test_a_ticket_is_good_once_and_for_its_request_only() -> None:
    pair = Pair()
    request = prompt("r", 50)
    result = pair.compute(request)
    assert result.kv is not None
    pair.send(Submit(continued(prompt("other", 50), result.first), result.kv))
    pair.run()
    assert pair.error_code("other") == "ticket_invalid"
    pair.send(Submit(continued(prompt("r", 40), result.first), result.kv))
    pair.run()
    assert pair.error_code("r") == "ticket_invalid"
    pair.start_decode(request, result)
    pair.run()
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    pair.start_decode(request, result)
    pair.run()
    assert pair.error_code("r") == "ticket_invalid"
    pair.assert_nothing_held()


@pytest.mark.parametrize("change", [{"block_ids": (1 << 20, 1, 2, 3)}, {"block_size": 4096, "block_ids": (0,)}])
def test_a_sealed_ticket_that_makes_no_sense_ends_in_recompute(change: dict[str, object]) -> None:
    """Sealed with the right key, as by a prefill worker with a bug."""
    pair = Pair()
    request = prompt("r", 50)
    result = pair.compute(request)
    assert result.kv is not None
    handle = msgspec.structs.replace(open_ticket(result.kv, KEY), **change)
    if "block_size" in change:
        handle = msgspec.structs.replace(handle, generations=handle.generations[:1])
    pair.start_decode(request, msgspec.structs.replace(result, kv=seal(handle, KEY)))
    pair.run()
    assert [*result.first.token_ids, *pair.tokens("r")] == pair.alone(request)
    pair.release(request)
    pair.advance(SETTLE_S)
    pair.run()
    pair.assert_nothing_held()
