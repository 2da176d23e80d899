"""What `cluster status` says of a worker: what the launch knows, and what the worker itself answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import WorkerLost
from cluster.launch.control_cli import _show
from cluster.launch.control_messages import Deployment, WorkerStatus
from cluster.launch.pools import with_load
from cluster.rpc import admin
from cluster.types import Role

READY = WorkerStatus("decode-0", Role.DECODE, "127.0.0.1:7200", "ready", 42)


def answering(monkeypatch: pytest.MonkeyPatch, *, is_draining: bool) -> None:
    load = SimpleNamespace(num_running=3, num_waiting=1, num_free_blocks=90, num_blocks=100)

    async def get_info(address: str) -> Any:
        return SimpleNamespace(engine_id="e"), load, is_draining

    monkeypatch.setattr(admin, "get_info", get_info)


def not_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    async def get_info(address: str) -> Any:
        raise WorkerLost(f"worker {address} does not answer")

    monkeypatch.setattr(admin, "get_info", get_info)


@pytest.mark.parametrize(
    ("state", "is_draining", "shown"),
    [("ready", False, "ready"), ("ready", True, "draining"), ("restarting", True, "restarting")],
)
async def test_a_worker_that_somebody_else_drains_is_shown_as_draining(
    monkeypatch: pytest.MonkeyPatch, state: str, is_draining: bool, shown: str
) -> None:
    answering(monkeypatch, is_draining=is_draining)
    status = await with_load(WorkerStatus("decode-0", Role.DECODE, "127.0.0.1:7200", state, 42))
    assert (status.state, status.num_running, status.num_free_blocks) == (shown, 3, 90)


@pytest.mark.parametrize(
    ("address", "state", "shown"),
    [
        ("127.0.0.1:7200", "ready", "silent"),
        ("127.0.0.1:7200", "starting", "starting"),
        ("127.0.0.1:0", "ready", "ready"),  # in the router's process: it has no port
    ],
)
async def test_a_ready_worker_that_does_not_answer_is_silent(
    monkeypatch: pytest.MonkeyPatch, address: str, state: str, shown: str
) -> None:
    not_answering(monkeypatch)
    assert (await with_load(WorkerStatus("w", Role.DECODE, address, state, 42))).state == shown


async def test_counts_that_nobody_has_told_are_not_shown_as_zeros(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, is_draining=False)
    told = await with_load(READY)
    monkeypatch.setenv("COLUMNS", "160")
    _show(
        Deployment("http://127.0.0.1:8000", "demo", (told, WorkerStatus("w", Role.DECODE, "127.0.0.1:0", "ready", 43)))
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-4:] == ["42", "3", "1", "90/100"]
    assert lines[-1].split()[-4:] == ["43", "-", "-", "-"]
