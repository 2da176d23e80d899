"""Result lines: complete, appended, readable."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import append_result, read_results


def test_lines_are_appended_and_say_where_they_come_from(tmp_path: Path) -> None:
    first = append_result("gemm", "ratio", 0.98, "x", {"rows": 16}, device="Some GPU (80GB)", directory=tmp_path)
    second = append_result("gemm", "ratio", 1.5, "x", {}, device="Some GPU (80GB)", directory=tmp_path)
    assert first == second
    low, high = read_results(first)
    assert (low.value, low.params, high.value) == (0.98, {"rows": 16}, 1.5)
    assert first.name == f"{low.date}-some-gpu-80gb-gemm.jsonl"
    assert low.versions["torch"]
    assert low.commit not in ("", "+")
