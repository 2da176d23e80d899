"""A deployment of our own for a benchmark or an integration test: started, waited for, stopped, checked.

It goes the user's way, through `cluster launch` in a process of its own, so what is measured is what is
shipped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from cluster.launch.child import dying_with_us, python_module
from cluster.launch.ports import choose_free_port

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


class DeploymentFailed(RuntimeError):
    """It did not start or did not stop cleanly; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running deployment. `log` is what its processes have written so far."""

    url: str
    launcher: subprocess.Popen[bytes]
    log: Path

    def log_tail(self, num_lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def worker_pids(self) -> dict[int, str]:
        """pid -> command line of every process below the launcher."""
        found: dict[int, str] = {}
        pending = [self.launcher.pid]
        while pending:
            parent = pending.pop()
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                children = [int(pid) for pid in task.read_text().split()]
                pending.extend(children)
                for pid in children:
                    with contextlib.suppress(FileNotFoundError):
                        found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found


@contextlib.contextmanager
def deployment(
    model: str, settings: Sequence[str], *, environment: dict[str, str] | None = None
) -> Iterator[Deployment]:
    """`cluster launch MODEL --set ...` on a free port, ready when entered, drained when left.

    `settings` are config keys, such as "prefill.replicas=2". Raises `DeploymentFailed` when it does not
    become healthy, or does not end with exit code 0 after SIGTERM. Whoever is killed in the block takes it along:
    enter it in a thread that lives as long.
    """
    port = choose_free_port("127.0.0.1")
    flags = [flag for setting in (f"router.port={port}", *settings) for flag in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as log_file:
            launcher = subprocess.Popen(
                dying_with_us(python_module("cluster", "launch", model, *flags)),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        running = Deployment(f"http://127.0.0.1:{port}", launcher, log)
        try:
            _wait_until_healthy(running)
            yield running
        finally:
            exit_code = _stop(launcher)
        if exit_code != 0:
            raise DeploymentFailed(f"the deployment ended with exit code {exit_code}:\n{running.log_tail()}")


def _wait_until_healthy(running: Deployment) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if running.launcher.poll() is not None:
            raise DeploymentFailed(f"the deployment did not start:\n{running.log_tail()}")
        if is_healthy(running.url):
            return
        time.sleep(0.2)
    raise DeploymentFailed(f"not healthy after {START_TIMEOUT_S:g} s:\n{running.log_tail()}")


def is_healthy(url: str) -> bool:
    """Also a router that does not answer is not, yet: it may be busy."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    return False


def _stop(launcher: subprocess.Popen[bytes]) -> int:
    if launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)
    try:
        return launcher.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        return launcher.wait()
