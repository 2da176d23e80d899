"""A Ray cluster of our own for a benchmark or a test: private port, directory and token, all of it gone at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.launch.ports import choose_free_port

START_TIMEOUT_S = 60.0
OBJECT_STORE_BYTES = 80 << 20
STARTED = "Ray runtime started"
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass
class RayHead:
    """`environment`: what a process needs to be let in."""

    address: str
    directory: Path
    environment: dict[str, str]
    head: subprocess.Popen[bytes]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # by their address

    def add_node(self, host: str, *arguments: str) -> None:
        """One more node on this machine: a raylet with an address of its own, such as 127.0.0.3."""
        command = ("start", "--address", self.address, "--node-ip-address", host, *arguments)
        log = self.directory / f"{host}.log"
        self.nodes[host] = _begin(command, self.environment, log)
        _wait_until_started(self.nodes[host], log)

    def kill_node(self, host: str) -> None:
        _kill_all(self.nodes.pop(host))

    def kill_control_store(self) -> None:
        """The server of the head that all of Ray depends on; the head's raylet and its processes stay."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                program = path.read_bytes().partition(b"\0")[0]
                if program.endswith(b"/gcs_server") and os.getpgid(int(path.parent.name)) == self.head.pid:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
        raise RuntimeError("the head has no control store")

    def close(self) -> None:
        for process in (*self.nodes.values(), self.head):
            _kill_all(process)


@contextmanager
def ray_head(num_cpus: int, *arguments: str, **environment: str) -> Iterator[RayHead]:
    """`arguments`: for `ray start`. `environment`: of Ray's processes, in addition to ours. Raises `RuntimeError` with
    Ray's own words."""
    directory = Path(tempfile.mkdtemp(prefix="tray-", dir="/tmp"))  # short: it holds Unix sockets
    port = choose_free_port("127.0.0.1")
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **environment,
    }
    command: tuple[str, ...] = ("start", "--head", "--port", str(port), "--temp-dir", str(directory / "ray"))
    command += ("--num-cpus", str(num_cpus), "--include-dashboard", "false", *arguments)
    process = _begin(command, ours, directory / "head.log")
    head = RayHead(f"127.0.0.1:{port}", directory, ours, process)
    try:
        _wait_until_started(process, directory / "head.log")
        yield head
    finally:
        head.close()
        shutil.rmtree(directory, ignore_errors=True)


def _begin(arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start` with those arguments, in a process group of its own."""
    command = [*RAY, *arguments, "--block", "--disable-usage-stats", "--object-store-memory", str(OBJECT_STORE_BYTES)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def _wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while STARTED not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(START_TIMEOUT_S)
