"""Whether a process may use the library's products: not on a share of the multiprocessors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.engine.kernels import gpu_share
from cluster.engine.kernels.gpu_share import SHARE_VARIABLE, has_mps, library_serves
from cluster.launch import mps


def test_the_launcher_and_the_engine_mean_the_same_variables(tmp_path: Path) -> None:
    assert (SHARE_VARIABLE, gpu_share.PIPE_VARIABLE) == (mps.PERCENT_VARIABLE, mps.PIPE_VARIABLE)
    assert gpu_share._DEFAULT_PIPE == mps.DEFAULT_PIPE
    pipe = tmp_path / "control"
    for environment in ({}, {mps.PIPE_VARIABLE: "/mps"}):
        assert has_mps(environment, pipe) is mps.operator_runs_one(environment, pipe) is bool(environment)
    pipe.touch()
    assert has_mps({}, pipe)


@pytest.mark.parametrize(
    ("share", "serves"),
    [(None, True), ("", True), ("100", True), ("60", False), ("99.5", False), ("60%", False)],
)
def test_only_a_whole_device_has_the_library(share: str | None, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    if share is not None:
        monkeypatch.setenv(SHARE_VARIABLE, share)
    assert library_serves() is serves
