"""Comparing outputs bit by bit, and the file they are kept in."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.verify.comparison import compare
from cluster.verify.model import Case, Output, Recording, fp32_bits, read_recording, write_recording

CASE = Case(name="a", prompt=(1,), max_tokens=3, temperature=0.0, top_k=0, top_p=1.0, seed=1)
OUTPUT = Output((5, 6, 7), ("aa", "bb", "cc"), (("aa",), ("bb",), ("cc",)))


@given(st.integers(0, 2**32 - 1))
def test_fp32_bits_survive_json(bits: int) -> None:
    """The router writes a worker's fp32 logprob as JSON; what is read back has the same four bytes."""
    (value,) = struct.unpack(">f", struct.pack(">I", bits))
    if math.isfinite(value):
        assert fp32_bits(msgspec.json.decode(msgspec.json.encode(value))) == f"{bits:08x}"


def test_a_value_that_is_no_fp32_number_is_told_from_the_one_beside_it() -> None:
    (value,) = struct.unpack("f", struct.pack("f", -1.1))
    assert fp32_bits(round(value, 6)) != fp32_bits(value)
    assert len(fp32_bits(-1.1)) == 16


def test_compare_names_the_first_position_of_each_case() -> None:
    other = Output((5, 6, 8), ("aa", "b0", "c0"), OUTPUT.top_bits)
    (difference,) = compare([CASE], [OUTPUT], [other])
    assert (difference.position, difference.reference_token, difference.other_token) == (1, 6, 6)
    assert (difference.reference_bits, difference.other_bits) == ("bb", "b0")
    assert compare([CASE, CASE], [OUTPUT, OUTPUT], [OUTPUT, OUTPUT]) == []


def test_compare_sees_a_shorter_output_and_other_alternatives() -> None:
    (shorter,) = compare([CASE], [OUTPUT], [Output((5, 6), ("aa", "bb"), (("aa",), ("bb",)))])
    assert (shorter.position, shorter.reference_token, shorter.other_token) == (2, 7, None)
    (alternative,) = compare([CASE], [OUTPUT], [Output(OUTPUT.token_ids, OUTPUT.logprob_bits, (("aa",), ("b0",), ()))])
    assert (alternative.position, alternative.other_bits) == (1, "b0 (alternative)")


def test_recording_is_read_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    recording = Recording(version=1, model="m", cases=(CASE,), outputs=(OUTPUT,))
    write_recording(path, recording)
    assert read_recording(path) == recording
    path.write_bytes(b'{"version": 1}')
    with pytest.raises(ConfigError, match=r"recording\.json is no recording"):
        read_recording(path)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(recording, version=2)))
    with pytest.raises(ConfigError, match="format version 2"):
        read_recording(path)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(recording, outputs=())))
    with pytest.raises(ConfigError, match="1 cases and 0 outputs"):
        read_recording(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_recording(tmp_path / "missing.json")
