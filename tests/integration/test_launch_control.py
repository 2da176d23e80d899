"""The control socket, and processes that join and leave a launch, with small fake processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.config import LaunchSettings
from cluster.errors import ConfigError, StartupError
from cluster.launch.control_messages import SOCKET_NAME, Answer, Command, Doing, Done, Drain, Status
from cluster.launch.control_socket import ask, control_server, find_launch
from cluster.launch.local import LocalLauncher
from tests.integration.fake_launch import no_probe, spec
from tests.integration.test_launch_processes import RecordingView


async def echo(command: Command) -> AsyncIterator[Answer]:
    yield Doing("thinking")
    yield Done(repr(command))


async def test_a_command_gets_its_progress_and_its_answer(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 40)  # longer than a socket address may be
    directory.mkdir()
    shown: list[str] = []
    async with control_server(directory, echo):
        assert (directory / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
        answer = await asyncio.to_thread(ask, directory, Drain("prefill-0"), shown.append)
    assert answer == Done("Drain(worker='prefill-0')")
    assert shown == ["thinking"]
    with pytest.raises(StartupError, match="does not answer"):
        ask(directory, Status(), shown.append)


@pytest.mark.parametrize("line", [b"{}\n", b'{"type":"drain","worker":5}\n', b"\xff\n", b"\n"])
async def test_what_is_no_command_is_refused(tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with control_server(tmp_path, echo):
        reader, writer = await asyncio.open_unix_connection(SOCKET_NAME)
        writer.write(line)
        assert b'"type":"refused"' in await reader.readline()
        writer.close()


def test_the_launch_that_is_meant_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no launch of yours is running"):
        find_launch()
    for pid in (os.getpid(), os.getppid()):
        directory = tmp_path / f"tandem-launch-{pid}-x"
        directory.mkdir()
        fcntl.flock(os.open(directory / "lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(directory)
            listener.bind(SOCKET_NAME)
    with pytest.raises(ConfigError, match="several launches"):
        find_launch()
    assert find_launch(os.getpid()).name == f"tandem-launch-{os.getpid()}-x"
    with pytest.raises(ConfigError, match="process id 1;"):
        find_launch(1)


async def test_processes_join_and_leave_and_one_that_cannot_start_changes_nothing() -> None:
    view = RecordingView()
    launcher = LocalLauncher([spec("one", "serve")], LaunchSettings(drain_timeout_s=1), view, no_probe)
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    await launcher.add(spec("two", "serve"))
    assert launcher.state_of("two") == "ready"
    with pytest.raises(StartupError, match="three could not start"):
        await launcher.add(spec("three", "fail-at-start"))
    pid = launcher.pid_of("one")
    assert await launcher.drain("one"), "it ended by itself"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert launcher.state_of("two") == "ready"
    assert not [what for name, what in view.news if name == "one" and what.startswith("died")]
    launcher.stop("done")
    await asyncio.wait_for(running, 20)
