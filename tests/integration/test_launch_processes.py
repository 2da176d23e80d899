"""The launcher with small fake processes: what it reports, what it restarts, and that nothing is left."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.processes import is_running, wait_gone
from cluster.config import LaunchSettings
from cluster.errors import StartupError
from cluster.launch import local
from cluster.launch.local import LocalLauncher
from cluster.process_events import ProcessEvent, Ready
from cluster.stop import ECHO_S
from tests.integration.fake_launch import no_probe, spec

WAIT_S = 60.0
SOON_S = 20.0  # less than the usual drain time


class RecordingView:
    """Notes everything; `until` waits for a piece of news."""

    def __init__(self) -> None:
        self.news: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def _note(self, name: str, what: str) -> None:
        self.news.append((name, what))
        self._changed.set()

    def on_start(self, name: str) -> None:
        self._note(name, "start")

    def on_event(self, name: str, event: ProcessEvent) -> None:
        self._note(name, f"ready {event.detail}" if isinstance(event, Ready) else type(event).__name__)

    def on_log(self, name: str, line: str) -> None:
        self._note(name, f"log {line}")

    def on_death(self, name: str, how: str, last_words: Sequence[str], restart_in_s: float) -> None:
        self._note(name, f"died {how}: {' / '.join(last_words)}")

    def on_serving(self) -> None:
        self._note("cluster", "serving")

    def on_stop(self, reason: str) -> None:
        self._note("cluster", f"stop {reason}")

    async def until(self, name: str, what: str, count: int = 1) -> None:
        async with asyncio.timeout(WAIT_S):
            while sum(n == name and w.startswith(what) for n, w in self.news) < count:
                self._changed.clear()
                await self._changed.wait()


def pids(view: RecordingView) -> list[int]:
    return [int(what.rsplit(" ", 1)[1]) for _, what in view.news if what.startswith("ready pid")]


async def test_serves_and_drains_the_router_before_the_workers() -> None:
    view = RecordingView()
    launcher = LocalLauncher(
        [spec("router", "serve", 0), spec("decode-0", "serve", 1)], LaunchSettings(), view, no_probe
    )
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    launcher.stop("enough")
    await asyncio.wait_for(running, WAIT_S)
    drained = [name for name, what in view.news if what == "log drained"]
    assert drained == ["router", "decode-0"]
    assert launcher.killed == []
    assert not any(is_running(pid) for pid in pids(view))


async def test_a_process_that_dies_at_start_shows_its_last_words_and_stops_the_others() -> None:
    view = RecordingView()
    specs = [spec("decode-0", "serve"), spec("prefill-0", "crash-at-start")]
    with pytest.raises(StartupError) as caught:
        await asyncio.wait_for(LocalLauncher(specs, LaunchSettings(), view, no_probe).run(), WAIT_S)
    assert "prefill-0 could not start (exit code 3)" in caught.value.message
    assert "the weights are not here" in caught.value.message
    assert not any(is_running(pid) for pid in pids(view))


async def test_a_typed_failure_is_preferred_to_the_tail_of_stderr() -> None:
    launcher = LocalLauncher([spec("prefill-0", "fail-at-start")], LaunchSettings(), RecordingView(), no_probe)
    with pytest.raises(StartupError, match=r"model_error: missing tensor blk\.3\.attn_q\.weight"):
        await asyncio.wait_for(launcher.run(), WAIT_S)


async def test_a_process_that_is_never_ready_is_named() -> None:
    settings = LaunchSettings(start_timeout_s=1.0)
    launcher = LocalLauncher([spec("decode-0", "never-ready")], settings, RecordingView(), no_probe)
    with pytest.raises(StartupError, match=r"decode-0 could not start .not ready after 1 s"):
        await asyncio.wait_for(launcher.run(), WAIT_S)


async def test_a_process_that_dies_later_is_reported_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "FIRST_RESTART_PAUSE_S", 0.01)
    view = RecordingView()
    marker = tmp_path / "died"
    launcher = LocalLauncher(
        [spec("decode-0", f"crash-once:{marker}"), spec("router", "serve", 0)], LaunchSettings(), view, no_probe
    )
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    marker.with_suffix(".go").touch()
    await view.until("decode-0", "ready", count=2)
    launcher.stop("enough")
    await asyncio.wait_for(running, WAIT_S)
    assert ("decode-0", "died killed by SIGKILL: out of luck") in view.news
    assert sum(news == ("router", "start") for news in view.news) == 1


async def test_restarts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FIRST_RESTART_PAUSE_S", 0.01)
    view = RecordingView()
    go = tmp_path / "go"
    launcher = LocalLauncher(
        [spec("decode-0", f"crash-when-ready:{go}")], LaunchSettings(max_restarts=2), view, no_probe
    )
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    go.touch()
    with pytest.raises(StartupError, match="died 3 times within"):
        await asyncio.wait_for(running, WAIT_S)
    assert sum(news == ("decode-0", "start") for news in view.news) == 3


async def test_a_process_that_ignores_sigterm_is_killed_after_the_drain_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "DRAIN_MARGIN_S", 0.0)
    view = RecordingView()
    launcher = LocalLauncher([spec("decode-0", "deaf")], LaunchSettings(drain_timeout_s=0.2), view, no_probe)
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    launcher.stop("enough")
    await asyncio.wait_for(running, SOON_S)
    assert not any(is_running(pid) for pid in pids(view))
    assert launcher.killed == ["decode-0"]


async def test_output_that_is_no_event_is_a_log_line_and_harmless() -> None:
    view = RecordingView()
    launcher = LocalLauncher([spec("decode-0", "noisy")], LaunchSettings(), view, no_probe)
    running = asyncio.create_task(launcher.run())
    await view.until("cluster", "serving")
    launcher.stop("enough")
    await asyncio.wait_for(running, WAIT_S)
    logged = [what for _, what in view.news if what.startswith("log ")]
    assert max(map(len, logged)) < 40_000
    assert any("[2Jno event" in line for line in logged)
    assert not any("\x1b" in line for line in logged)


def start_launch(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.fake_launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(launch: subprocess.Popen[str], text: str) -> list[str]:
    assert launch.stdout is not None
    lines: list[str] = []
    for line in launch.stdout:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail(f"{text!r} never came, but: {lines}")


def pids_of(lines: list[str]) -> list[int]:
    return [int(line.rsplit("pid ", 1)[1]) for line in lines if "ready at" in line and "pid " in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_leaves_nothing_behind(number: signal.Signals) -> None:
    launch = start_launch("router=serve", "decode-0=serve")
    lines = read_until(launch, "Try: curl")
    launch.send_signal(number)
    out, err = launch.communicate(timeout=WAIT_S)
    assert launch.returncode == 0, err
    assert out.count("drained") == 2
    assert len(pids_of(lines)) == 2
    assert not any(is_running(pid) for pid in pids_of(lines))


def test_a_second_signal_kills_at_once_and_an_echo_of_the_first_does_not() -> None:
    launch = start_launch("decode-0=deaf")
    lines = read_until(launch, "Try: curl")
    launch.send_signal(signal.SIGINT)
    read_until(launch, "draining")
    launch.send_signal(signal.SIGINT)  # as `timeout` and others do, which tell a whole group
    time.sleep(ECHO_S / 2)
    assert launch.poll() is None
    deadline = time.monotonic() + SOON_S  # the drain time would be 30 s
    while launch.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(ECHO_S / 2)
        launch.send_signal(signal.SIGINT)
    launch.communicate(timeout=WAIT_S)
    assert not any(is_running(pid) for pid in pids_of(lines))


def test_no_orphan_even_when_the_launcher_is_killed() -> None:
    launch = start_launch("router=serve", "decode-0=deaf")
    lines = read_until(launch, "Try: curl")
    launch.kill()
    launch.communicate(timeout=WAIT_S)
    assert len(pids_of(lines)) == 2
    wait_gone(pids_of(lines), WAIT_S)


def test_what_a_dead_process_had_started_goes_with_it(tmp_path: Path) -> None:
    child_pid = tmp_path / "pid"
    launch = start_launch(f"decode-0=crash-with-child:{child_pid}")
    launch.communicate(timeout=WAIT_S)
    assert launch.returncode == 1
    wait_gone([int(child_pid.read_text())], WAIT_S)


def test_a_failed_start_exits_with_1_and_no_traceback_of_the_launcher() -> None:
    launch = start_launch("router=serve", "prefill-0=crash-at-start")
    _, err = launch.communicate(timeout=WAIT_S)
    assert launch.returncode == 1
    assert "the weights are not here" in err
    assert "Traceback" not in err
