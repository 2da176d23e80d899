"""A monolithic deployment for the time of a comparison (`cluster verify URL --monolithic demo`)."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from cluster.errors import StartupError
from cluster.launch.child import dying_with_us, python_module
from cluster.launch.ports import choose_free_port

HOST = "127.0.0.1"
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.2
NUM_LAST_LINES = 20


@contextmanager
def monolithic_companion(target: str, settings: Sequence[str] = ()) -> Iterator[str]:
    """Launch `target` as one process, give its URL, stop it at the end. Raises `StartupError` with what
    the launch said."""
    url = f"http://{HOST}:{(port := choose_free_port(HOST))}"
    arguments = ["--monolithic", "--host", HOST, "--port", str(port), "--external", "none"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    command = dying_with_us(python_module("cluster", "launch", target, *arguments))
    with tempfile.TemporaryFile() as output:
        launch = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            if not _becomes_healthy(launch, url):
                output.seek(0)
                words = output.read().decode(errors="replace").splitlines()[-NUM_LAST_LINES:]
                raise StartupError("\n".join(["the monolithic deployment did not start:", *words]))
            yield url
        finally:
            _stop(launch)


def _becomes_healthy(launch: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while launch.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(f"{url}/health").status_code == httpx.codes.OK:
                    return True
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_S)
    return False


def _stop(launch: subprocess.Popen[bytes]) -> None:
    launch.terminate()
    try:
        launch.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        launch.kill()
        launch.wait()
