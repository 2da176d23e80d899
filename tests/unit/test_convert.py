"""Structs survive the wire with every bit; garbage is an InvalidRequest that names the field."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from cluster.rpc import convert
from cluster.rpc.base import Inspection
from cluster.rpc.pb.serving.v1 import common_pb2 as pb
from cluster.types import (
    FinishReason,
    HistogramReading,
    PrefillResult,
    PrefillStarted,
    Request,
    RequestError,
    Role,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    WorkerInfo,
    WorkerLoad,
)

uint32 = st.integers(0, 2**32 - 1)
float32 = st.floats(width=32, allow_nan=False)
logprob = st.builds(
    TokenLogprob,
    uint32,
    float32,
    st.integers(1, 2**32 - 1),
    st.lists(st.tuples(uint32, float32), max_size=4).map(tuple),
)
sampling = st.builds(
    SamplingParams,
    max_tokens=uint32,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(uint32, st.floats(-100, 100)), max_size=3).map(tuple),
    stop=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


@given(
    st.builds(
        Request,
        request_id=st.text("abcdef0123456789", min_size=1, max_size=64),
        token_ids=st.lists(uint32, min_size=1, max_size=9).map(tuple),
        sampling=sampling,
        attempt=uint32,
        num_prompt_tokens=st.integers(0, 1),
        deadline_s=st.none() | st.floats(0, 1e6),
        tenant=st.text(max_size=9),
        cache_salt=st.binary(max_size=16),
    )
)
def test_request_round_trip(request: Request) -> None:
    wire = convert.request_to_pb(request).SerializeToString()
    assert convert.request_from_pb(pb.Request.FromString(wire)) == request


@given(st.lists(logprob, max_size=5))
def test_chunk_round_trip_keeps_logprob_bits(logprobs: list[TokenLogprob]) -> None:
    chunk = TokenChunk(
        request_id="r",
        attempt=3,
        index=7,
        token_ids=tuple(entry.token_id for entry in logprobs),
        logprobs=tuple(logprobs),
        finish_reason=FinishReason.STOP,
        stop_token_id=0,
        error=RequestError(code="worker_lost", message="gone"),
        num_cached_tokens=64,
        prompt_logprobs=(None, *logprobs),
    )
    back = convert.chunk_from_pb(pb.TokenChunk.FromString(convert.chunk_to_pb(chunk).SerializeToString()))
    assert back == chunk
    for sent, received in zip(chunk.logprobs, back.logprobs, strict=True):
        assert struct.pack("<f", sent.logprob) == struct.pack("<f", received.logprob)  # also -0.0 against 0.0


def test_special_logprobs_survive() -> None:
    for value in (-0.0, -math.inf, 1.401298464324817e-45):
        entry = TokenLogprob(5, value, 1)
        back = convert.logprob_from_pb(pb.TokenLogprob.FromString(convert.logprob_to_pb(entry).SerializeToString()))
        assert back is not None
        assert struct.pack("<d", back.logprob) == struct.pack("<d", value)


def test_absent_and_zero_are_different() -> None:
    chunk = TokenChunk(request_id="r", attempt=0, index=0, token_ids=(1,))
    back = convert.chunk_from_pb(convert.chunk_to_pb(chunk))
    assert back.finish_reason is None
    assert back.stop_token_id is None
    assert back.error is None
    result = PrefillResult(first=chunk, kv=None, prompt_logprobs=(None, TokenLogprob(1, -1.5, 2, ((4, -0.5),))))
    assert convert.result_from_pb(convert.result_to_pb(result)) == result
    started = PrefillStarted(request_id="r", attempt=1, kv=b"\x00\xff")
    assert convert.started_from_pb(convert.started_to_pb(started)) == started


def test_info_load_and_inspection_round_trip() -> None:
    info = WorkerInfo(
        engine_id="e",
        role=Role.DECODE,
        model_name="m",
        model_digest="d",
        numeric_fingerprint="f",
        max_model_len=8192,
        vocab_size=49152,
        block_size=32,
        num_blocks=100,
        weight_version="w",
    )
    assert convert.info_from_pb(convert.info_to_pb(info)) == info
    readings = (HistogramReading("vllm:a", (0.5, 1.0), (1, 2, 3), 4.25), HistogramReading("b", (), (7,), 0.0))
    others = {"histograms": readings, "spec_accepted_per_position": (5, 3, 0)}
    numbers = {name: at + 1 for at, name in enumerate(WorkerLoad.__struct_fields__) if name not in others}
    load = msgspec.structs.replace(msgspec.convert(numbers, WorkerLoad), **others)
    assert convert.load_from_pb(convert.load_to_pb(load)) == load
    unchanged = convert.load_to_pb(load, with_histograms=False)
    assert convert.load_from_pb(unchanged, earlier=readings) == load
    assert convert.load_from_pb(unchanged).histograms == ()
    too_long = convert.load_to_pb(msgspec.structs.replace(load, spec_accepted_per_position=(1,) * 129))
    with pytest.raises(InvalidRequest, match="spec_accepted_per_position"):
        convert.load_from_pb(too_long)
    inspection = Inspection(num_blocks=9, num_free=8, num_owned=1, kv_digests=(2**64 - 1, 0), num_digest_tokens=32)
    assert convert.inspection_from_pb(convert.inspection_to_pb(inspection)) == inspection


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("request_id", {"request_id": ""}),
        ("request_id", {"request_id": "x" * 129}),
        ("token_ids", {"token_ids": []}),
        ("sampling", {"sampling": None}),
        ("num_prompt_tokens", {"num_prompt_tokens": 3}),
        ("cache_salt", {"cache_salt": b"x" * 65}),
        ("logit_bias", {"sampling": pb.SamplingParams(logit_bias_ids=[1])}),
    ],
)
def test_malformed_request_names_the_field(field: str, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"request_id": "r", "token_ids": [1, 2], "sampling": pb.SamplingParams(max_tokens=1)}
    with pytest.raises(InvalidRequest) as caught:
        convert.request_from_pb(pb.Request(**good | changes))
    assert caught.value.param == field


def test_malformed_answers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        convert.chunk_from_pb(pb.TokenChunk(token_ids=[1, 2], logprobs=[pb.TokenLogprob(rank=1)]))
    with pytest.raises(InvalidRequest, match="finish_reason"):
        convert.chunk_from_pb(pb.TokenChunk(finish_reason=77))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="role"):
        convert.info_from_pb(pb.WorkerInfo(engine_id="e"))
