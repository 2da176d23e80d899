"""Whether a process may use the library's products: not on a share of the multiprocessors."""

from __future__ import annotations

import pytest

from cluster.gpu_share import DEFAULT_PIPE, PIPE_VARIABLE, SHARE_VARIABLE, library_serves


def test_the_variables_are_those_of_cuda() -> None:
    """The launcher sets what the engine reads; CUDA's client library reads the same."""
    assert (SHARE_VARIABLE, PIPE_VARIABLE) == ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PIPE_DIRECTORY")
    assert str(DEFAULT_PIPE) == "/tmp/nvidia-mps/control"


@pytest.mark.parametrize(
    ("share", "serves"),
    [(None, True), ("", True), ("100", True), ("60", False), ("99.5", False), ("60%", False)],
)
def test_only_a_whole_device_has_the_library(share: str | None, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    if share is not None:
        monkeypatch.setenv(SHARE_VARIABLE, share)
    assert library_serves() is serves
