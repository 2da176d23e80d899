"""Where a served process keeps what Triton compiled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.engine.kernels.cuda_select import keep_compiled_kernels

TRITON = "TRITON_CACHE_DIR"


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    for name in (TRITON, "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)


def test_compiled_kernels_lie_in_our_cache(tmp_path: Path) -> None:
    keep_compiled_kernels()
    assert os.environ[TRITON] == str(tmp_path / "cache" / "triton")
    assert (tmp_path / "cache" / "triton").is_dir()


@pytest.mark.parametrize("name", [TRITON, "TRITON_HOME"])
def test_what_the_user_named_stays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/elsewhere")
    keep_compiled_kernels()
    assert os.environ.get(TRITON) == ("/elsewhere" if name == TRITON else None)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_left_to_triton(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    keep_compiled_kernels()
    assert TRITON not in os.environ
