"""`cluster launch demo` as a user runs it: it answers, survives a dead worker, and leaves nothing behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import is_healthy
from cluster.launch.ports import choose_free_port
from cluster.verify import VerifyOptions, run

START_S = 240.0
STOP_S = 60.0
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.timeout(600)


class Launch:
    """A launcher in a process of its own, and everything it has said."""

    def __init__(self, run_directory: Path, *arguments: str) -> None:
        self.port = choose_free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = run_directory / "log"
        runtime = run_directory / "runtime"
        runtime.mkdir()
        self.runtime = runtime
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster", "launch", "demo", "--port", str(self.port), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
            )

    @property
    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def wait_for(self, text: str, count: int = 1, timeout_s: float = START_S) -> str:
        """The line that has `text` for the `count`-th time."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [line for line in self.lines if text in line]
            if len(found) >= count:
                return found[count - 1]
            said = "\n".join(self.lines[-30:])
            assert self.process.poll() is None, f"the launch ended with {self.process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"{text!r} never came:\n{said}"
            time.sleep(0.05)

    def processes(self) -> dict[str, int]:
        """First word of the command line after -m -> pid, of the launcher's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children}
        return {words[words.index(b"-m") + 1].decode(): pid for pid, words in commands.items()}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def launch(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launch]:
    running = Launch(tmp_path, *request.param)
    yield running
    running.close()


def ask(url: str) -> str:
    body = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("launch", [("--prefill", "1", "--decode", "1")], indirect=True)
def test_split(launch: Launch) -> None:
    curl = launch.wait_for("Try: curl").partition("Try: ")[2]
    shown = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in shown.stdout
    assert "Paris" in ask(launch.url)
    processes = launch.processes()
    assert sorted(processes) == ["cluster.router", "decode", "prefill"]

    os.kill(processes["decode"], signal.SIGKILL)
    launch.wait_for("died (killed by SIGKILL), starting it again")
    launch.wait_for("decode-0 | ready at", count=2)
    deadline = time.monotonic() + STOP_S
    while not is_healthy(launch.url):
        assert time.monotonic() < deadline, "the router did not find the new worker"
        time.sleep(0.1)
    assert "Paris" in ask(launch.url)

    pids = list(launch.processes().values())
    assert launch.stop() == 0, launch.lines[-30:]
    assert_gone([*pids, processes["decode"]])
    assert list(launch.runtime.iterdir()) == [], "the private directory with the cluster key is left"


@pytest.mark.parametrize("launch", [("--monolithic",)], indirect=True)
def test_monolithic_verifies_against_itself(launch: Launch) -> None:
    launch.wait_for("Try: curl")
    assert "Paris" in ask(launch.url)
    assert list(launch.processes()) == ["cluster.launch.monolithic"]
    options = VerifyOptions(num_prompts=4, max_tokens=4, concurrency=(1, 4))
    assert run(launch.url, launch.url, options=options) == 0
    pids = list(launch.processes().values())
    assert launch.stop() == 0, launch.lines[-30:]
    assert_gone(pids)
    assert list(launch.runtime.iterdir()) == []


def test_a_taken_port_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as blocker:
        port = str(blocker.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "cluster", "launch", "demo", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is already taken" in done.stderr
