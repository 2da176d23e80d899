"""Figures that a GPU benchmark is set beside: read from the peer's lines and from our own records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.figures import Figures, peer_figures, recorded_figures
from benchmarks.gpu.record_exactness import CELLS, NUM_REQUESTS, chosen_cells
from benchmarks.results import append_result


def peer_lines(quantization: str | None, mode: str, factor: float) -> list[str]:
    found: list[dict[str, Any]] = [
        {"what": "setup", "quantization": quantization},
        {"what": "prefill", "tok_s": 40000.0 * factor},
        {"what": "decode", "batch": 1, "inter_token_ms": 6.0 / factor, "s_one_token": [0.0625, 0.03125 / factor, 0.0]},
        {"what": "decode", "batch": 256, "inter_token_ms": 12.0 / factor},
        {"what": "mixed", "total_tok_s": 26000.0 * factor},
        {"what": "end", "total_s": 110.0},
    ]
    return [json.dumps({"peer": "vllm", "mode": mode, **line}) for line in found]


def test_each_kind_of_weights_has_its_own_figures(tmp_path: Path) -> None:
    """One file of three runs, with the noise of a log between them."""
    path = tmp_path / "peer.jsonl"
    runs = [peer_lines(None, "default", 1.0), peer_lines("fp8", "default", 2.0), peer_lines(None, "invariant", 0.5)]
    path.write_text("INFO starting\n" + "\n".join(line for run in runs for line in run) + "\n")
    assert peer_figures(path) == Figures(40000.0, {1: 6.0, 256: 12.0}, 26000.0, {1: 31.25})
    assert peer_figures(path, "fp8") == Figures(80000.0, {1: 3.0, 256: 6.0}, 52000.0, {1: 15.625})


def test_without_a_peer_there_are_no_figures(tmp_path: Path) -> None:
    assert peer_figures(None) == peer_figures(tmp_path / "missing") == Figures()


def test_records_of_another_device_or_context_are_left_out(tmp_path: Path) -> None:
    def append(metric: str, value: float, device: str = "GPU A", **params: Any) -> Path:
        return append_result("engine_8b", metric, value, "", params, device=device, directory=tmp_path)

    path = append("prefill_tok_s", 1.0, prompts=16, tokens=2048)
    append("prefill_tok_s", 2.0, prompts=16, tokens=2048)
    append("decode_ms", 5.0, batch=1, context=256)
    append("decode_ms", 7.0, batch=1, context=7032)
    append("decode_ratio_vs_vllm", 1.1, batch=1)
    assert recorded_figures(path, "GPU A") == Figures(2.0, {1: 5.0}, None)
    with pytest.raises(ValueError, match=r"has no engine_8b of 'GPU B'"):
        recorded_figures(path, "GPU B")


def test_the_quick_cells_are_some_of_all() -> None:
    quick = chosen_cells(quick=True)
    assert len(quick) == 6
    assert {cell.name for cell in quick} < {cell.name for cell in chosen_cells(quick=False)} == {c.name for c in CELLS}
    assert max(cell.at_once for cell in quick) == NUM_REQUESTS


def test_the_newest_records_of_a_directory_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine_8b"):
        recorded_figures(tmp_path, "GPU")
    for index, value in enumerate((3.0, 2.0)):
        directory = tmp_path / str(index)
        append_result("engine_8b", "mixed_tok_s", value, "tok/s", {}, device="GPU", directory=directory)
        (found,) = directory.iterdir()
        (file := tmp_path / f"{index}-engine_8b.jsonl").write_bytes(found.read_bytes())
        os.utime(file, (1000 - index, 1000 - index))
    assert recorded_figures(tmp_path, "GPU").mixed_tok_s == 3.0
