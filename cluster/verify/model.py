"""What is asked, what came back, and the file both can be kept in.

A logprob travels through JSON as the shortest decimal of a double that holds the fp32 value, so packing
what was parsed gives the worker's four bytes back.
"""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec

from cluster.errors import ConfigError

FORMAT_VERSION = 1


class VerifyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent. Prompts longer than the context allows are cut to it."""

    num_prompts: int = 64
    max_tokens: int = 16
    concurrency: tuple[int, ...] = (1, 8, 32)
    num_top_logprobs: int = 2
    request_timeout_s: float = 600.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Temperature 0 is greedy."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


class Output(msgspec.Struct, frozen=True):
    """Parallel per position. Bits are hexadecimal, of the fp32 value."""

    token_ids: tuple[int, ...]
    logprob_bits: tuple[str, ...]
    top_bits: tuple[tuple[str, ...], ...]  # the most likely tokens' logprobs, in descending order


class Recording(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file of `--record` and `--against`."""

    version: int
    model: str
    cases: tuple[Case, ...]
    outputs: tuple[Output, ...]


def fp32_bits(value: float | None) -> str:
    """Eight hexadecimal digits. A value that is no fp32 number (a server that rounds) shows all 16 of its double."""
    if value is None:
        return ""
    packed = struct.pack(">f", value) if abs(value) < 3.4e38 else b""
    if packed and struct.unpack(">f", packed)[0] == value:
        return packed.hex()
    return struct.pack(">d", value).hex()


def read_recording(path: Path) -> Recording:
    try:
        recording = msgspec.json.decode(path.read_bytes(), type=Recording)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no recording of `cluster verify`: {error}") from error
    if recording.version != FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {recording.version}, this program reads {FORMAT_VERSION}")
    if len(recording.cases) != len(recording.outputs):
        raise ConfigError(f"{path} has {len(recording.cases)} cases and {len(recording.outputs)} outputs")
    return recording


def write_recording(path: Path, recording: Recording) -> None:
    try:
        path.write_bytes(msgspec.json.encode(recording) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
