"""Whether a process may use the library's products: not on a share of the multiprocessors."""

from __future__ import annotations

import pytest

from cluster.engine.kernels.gpu_share import SHARE_VARIABLE, library_serves
from cluster.launch.mps import PERCENT_VARIABLE


def test_the_launcher_and_the_engine_mean_the_same_variable() -> None:
    assert SHARE_VARIABLE == PERCENT_VARIABLE


@pytest.mark.parametrize(
    ("share", "serves"),
    [(None, True), ("", True), ("100", True), ("60", False), ("99.5", False), ("60%", False)],
)
def test_only_a_whole_device_has_the_library(share: str | None, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    if share is not None:
        monkeypatch.setenv(SHARE_VARIABLE, share)
    assert library_serves() is serves
