"""What others measured on the same machine: the peer's script, or an earlier run of ours."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import read_results


@dataclass
class Figures:
    """Of one engine. None, or a batch that is missing: not measured."""

    prefill_tok_s: float | None = None
    decode_ms: dict[int, float] = field(default_factory=dict)  # by batch
    mixed_tok_s: float | None = None
    one_token_ms: dict[int, float] = field(default_factory=dict)  # by batch: prompts of 128 tokens, one token out


def peer_figures(path: Path | None, quantization: str | None = None) -> Figures:
    """From the JSON lines of the peer's script: its default mode with weights of that kind. No file: nothing."""
    figures = Figures()
    for found in _peer_lines(path, quantization):
        match found:
            case {"what": "prefill", "tok_s": value}:
                figures.prefill_tok_s = value
            case {"what": "decode", "batch": batch, "inter_token_ms": value}:
                figures.decode_ms[batch] = value
                if "s_one_token" in found:
                    figures.one_token_ms[batch] = 1e3 * statistics.median(found["s_one_token"])
            case {"what": "mixed", "total_tok_s": value}:
                figures.mixed_tok_s = value
    return figures


@dataclass(frozen=True)
class Shape:
    """A workload of equal prompts that the peer was measured with, and what it took."""

    batch: int
    prompt_tokens: int
    out_tokens: int  # 1: a prefill, and the figure is tokens a second; else milliseconds of a decode step
    figure: float


def peer_shapes(path: Path, quantization: str | None = None) -> list[Shape]:
    """Every prefill and decode of the file, in its order; of those of one shape the last."""
    shapes: dict[tuple[int, int, int], Shape] = {}
    for found in _peer_lines(path, quantization):
        match found:
            case {"what": "prefill", "prompts": batch, "prompt_tokens": prompt, "out_tokens": 1, "tok_s": value}:
                shapes[batch, prompt, 1] = Shape(batch, prompt, 1, value)
            case {
                "what": "decode",
                "batch": batch,
                "prompt_tokens": prompt,
                "out_tokens": out,
                "inter_token_ms": value,
            }:
                shapes[batch, prompt, out] = Shape(batch, prompt, out, value)
    return list(shapes.values())


def _peer_lines(path: Path | None, quantization: str | None) -> Iterator[dict[str, Any]]:
    """Results of the peer's default mode with weights of that kind."""
    is_wanted = True
    for line in path.read_text().splitlines() if path is not None and path.exists() else ():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        if found.get("what") == "setup":
            is_wanted = found["quantization"] == quantization and found["mode"] == "default"
        if is_wanted:
            yield found


def recorded_figures(path: Path, device: str, context: int = 256) -> Figures:
    """The last ones of a file of `engine_8b` records, or of the newest such file of a directory. `ValueError` if there
    are none of this device."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*-engine_8b.jsonl"), key=lambda file: file.stat().st_mtime)[-1:]
    found = [each for file in files for each in read_results(file)]
    results = [each for each in found if each.benchmark == "engine_8b" and each.device == device]
    figures = Figures()
    if not results:
        raise ValueError(f"{path} has no engine_8b of {device!r}")
    for result in results:
        match result.metric, result.params:
            case "prefill_tok_s", _:
                figures.prefill_tok_s = result.value
            case "decode_ms", {"batch": int(batch), "context": length} if length == context:
                figures.decode_ms[batch] = result.value
            case "mixed_tok_s", _:
                figures.mixed_tok_s = result.value
    return figures
