"""Words of `python -m benchmarks.gpu` and what they start."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import engine_profile


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the profile is called with."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        engine_profile, "profile_engine", lambda only, requests, *, has_fp8: calls.append((only, requests, has_fp8))
    )
    monkeypatch.setattr(
        engine_profile, "compare_graphs", lambda values, requests, *, has_fp8: calls.append((values, requests, has_fp8))
    )
    return calls


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
    command.main()


def test_the_profile_is_of_the_model_that_is_named(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[object, ...]]
) -> None:  # fmt: skip
    run(monkeypatch, "engine-profile")
    run(monkeypatch, "engine-profile", "--model", "llama-fp8", "--only", "prefill")
    run(monkeypatch, "engine-profile", "--model", "llama-fp8", "--graph-prompt-rows", "0", "1536")
    assert started == [(None, 512, False), ("prefill", 512, True), ([0, 1536], 512, True)]


@pytest.mark.parametrize(
    "words", [("--model", "qwen3-moe"), ("--only", "decode", "--graph-prompt-rows", "0")]
)  # fmt: skip
def test_what_has_no_profile_is_refused(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[object, ...]], words: tuple[str, ...]
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, "engine-profile", *words)
    assert not started
