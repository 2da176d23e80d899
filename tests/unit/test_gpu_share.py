"""Whether a process may use the library's products: not on a share of the multiprocessors. And who serves shares."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.gpu_share import DEFAULT_PIPE, PIPE_VARIABLE, SHARE_VARIABLE, has_mps, library_serves


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


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_daemon_that_was_killed_is_none(kind: socket.SocketKind, tmp_path: Path) -> None:
    """Its socket stays behind. Which type it has is the daemon's business."""
    control = tmp_path / "control"
    named = {PIPE_VARIABLE: str(tmp_path)}
    with socket.socket(socket.AF_UNIX, kind) as daemon:
        daemon.bind(str(control))
        if kind != socket.SOCK_DGRAM:
            daemon.listen(1)
        for _ in range(4):  # more than its queue takes
            assert has_mps({}, control)
            assert has_mps(named)
    assert control.is_socket()
    assert not has_mps({}, control)
    assert not has_mps(named)


def test_what_cannot_be_asked_counts_as_there(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "control"))
    (tmp_path / "control").rename(directory / "control")
    assert has_mps({}, directory / "control"), "a path too long for us"
    assert has_mps({PIPE_VARIABLE: str(tmp_path / "nowhere")}), "as the operator says"
