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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.launch.ports import choose_free_port

START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 80 << 20
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass
class RayHead:
    """`environment`: what a process needs to be let in."""

    address: str
    directory: Path
    environment: dict[str, str]
    group: int  # the process group of all that the head consists of
    nodes: dict[str, int] = field(default_factory=dict)  # and of the other nodes, by their address

    def add_nodes(self, hosts: Sequence[str], *arguments: str) -> None:
        """More nodes on this machine: raylets with addresses of their own, such as 127.0.0.3. One after another: nodes
        that start at the same time would take the same sockets."""
        for host in hosts:
            command = ("start", "--address", self.address, "--node-ip-address", host, *arguments)
            self.nodes[host] = _start(command, self.environment)

    def kill_node(self, host: str) -> None:
        _kill_group(self.nodes.pop(host))

    def kill_control_store(self) -> None:
        """The server of the head that all of Ray depends on; the head's raylet and its processes stay."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                program = path.read_bytes().partition(b"\0")[0]
                if program.endswith(b"/gcs_server") and os.getpgid(int(path.parent.name)) == self.group:
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    return
        raise RuntimeError("the head has no control store")

    def close(self) -> None:
        for group in (*self.nodes.values(), self.group):
            _kill_group(group)


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
        "RAY_memory_monitor_refresh_ms": "0",  # never: our actors would be killed for memory that others have filled
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **environment,
    }
    command: tuple[str, ...] = ("start", "--head", "--port", str(port), "--temp-dir", str(directory / "ray"))
    command += ("--num-cpus", str(num_cpus), "--include-dashboard", "false", *arguments)
    try:
        head = RayHead(f"127.0.0.1:{port}", directory, ours, _start(command, ours))
        try:
            yield head
        finally:
            head.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _start(arguments: tuple[str, ...], environment: dict[str, str]) -> int:
    """`ray start` with those arguments; the process group of what it has started."""
    command = [*RAY, *arguments, "--disable-usage-stats", "--object-store-memory", str(OBJECT_STORE_BYTES)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            exit_code = process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        if exit_code != 0:
            _kill_group(process.pid)
            process.wait()
            output.seek(0)
            raise RuntimeError(f"Ray did not start:\n{output.read().decode(errors='replace')[-2000:]}")
    return process.pid


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
