"""Figures that a GPU benchmark is set beside: read from the peer's lines and from our own records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.figures import Figures, Shape, peer_figures, peer_shapes, recorded_figures
from benchmarks.gpu.record_exactness import CELLS, NUM_REQUESTS, chosen_cells
from benchmarks.gpu.record_shapes import record_shape, record_shapes
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


def test_every_shape_of_the_peer_s_runs_is_found_once(tmp_path: Path) -> None:
    def lines(prompt: int, out: int, prefill: tuple[int, int], decode: dict[int, float]) -> list[dict[str, Any]]:
        count, length = prefill
        first = {"what": "prefill", "prompts": count, "prompt_tokens": length, "out_tokens": 1, "tok_s": 4e4 + prompt}
        steps = [
            {"what": "decode", "batch": each, "prompt_tokens": prompt, "out_tokens": out, "inter_token_ms": value}
            for each, value in decode.items()
        ]
        return [{"what": "setup", "quantization": None}, first, *steps]

    path = tmp_path / "peer.jsonl"
    runs = lines(128, 256, (16, 2048), {1: 5.0, 160: 9.0}) + lines(3000, 64, (16, 2048), {1: 6.0})
    path.write_text("\n".join(json.dumps({"mode": "default", **line}) for line in runs))
    assert peer_shapes(path) == [
        Shape(16, 2048, 1, 43000.0), Shape(1, 128, 256, 5.0), Shape(160, 128, 256, 9.0), Shape(1, 3000, 64, 6.0),
    ]  # fmt: skip
    assert peer_shapes(path, "fp8") == []
    with pytest.raises(ValueError, match="has no prefill and no decode of the peer's FP8 mode"):
        record_shapes(tmp_path, path, has_fp8=True)


def test_a_shape_is_measured_as_the_peer_was_and_above_one_is_faster() -> None:
    class Bench:
        def prefill_tokens_per_s(self, count: int, length: int) -> float:
            assert (count, length) == (8, 3000)
            return 50000.0

        def decode_ms(self, batch: int, prompt: int, out: int) -> float:
            assert (batch, prompt, out) == (160, 128, 256)
            return 4.0

    found: list[Any] = []
    append: Any = lambda *each: found.append(each)  # noqa: E731
    bench: Any = Bench()
    assert record_shape(bench, Shape(8, 3000, 1, 40000.0), append) == 1.25
    assert record_shape(bench, Shape(160, 128, 256, 5.0), append) == 1.25
    assert [each[:2] for each in found] == [
        ("prefill_tok_s", 50000.0), ("prefill_ratio_vs_vllm", 1.25), ("decode_ms", 4.0), ("decode_ratio_vs_vllm", 1.25),
    ]  # fmt: skip
    assert found[3][3] == {"batch": 160, "context": 256, "vllm_ms": 5.0}


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
    assert len(quick) == 7
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
