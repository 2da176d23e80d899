"""NVIDIA's Multi-Process Service for workers that share a GPU: their kernels run side by side.

Without it the GPU is given to one process at a time, in slices: measured on one H200, a decode step beside a
prefill took 8.8 instead of 3.8 ms. The daemon is ours: it listens in the launch's private directory and ends
with the launch. One that the operator runs already (CUDA_MPS_PIPE_DIRECTORY is set, or it listens where CUDA looks
without it) is used as it is: two daemons on one GPU would take turns. What a killed one has left behind does not count.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.gpu_share import DEFAULT_PIPE, PIPE_VARIABLE, has_mps, listens
from cluster.launch.child import dying_with_us
from cluster.launch.process import describe_exit

logger = logging.getLogger(__name__)

LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
CONTROL = "nvidia-cuda-mps-control"
# Numbers in it count all GPUs for a worker, but would count the daemon's own choice of them if it had one. UUIDs mean
# the same to both, and a slice of a GPU (MIG) must be named to the daemon.
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_TIMEOUT_S = 20.0
_ENDING_S = 2.0  # between the closing of a dying process's sockets and its end; measured in milliseconds
_POLL_S = 0.05
_WITHOUT = (
    "the workers on it take turns instead of running side by side, and decode steps take more than twice as long "
    "while a prompt is computed; give each pool a GPU of its own (prefill.engine.device, decode.engine.device)"
)


@contextmanager
def mps_daemon(is_wanted: bool, directory: Path, default_pipe: Path = DEFAULT_PIPE) -> Iterator[str | None]:
    """Run the daemon while the block is entered; processes started inside find it through the environment.
    Yields None, or why there is none and what that costs, for the user to read."""
    if not is_wanted or has_mps(default_pipe=default_pipe):
        yield None
        return
    control = shutil.which(CONTROL)
    if control is None:
        yield f"a GPU is shared and {CONTROL} is not installed: {_WITHOUT}"
        return
    daemon = _Daemon(control, directory)
    failure = daemon.start()
    if failure is not None:
        yield f"a GPU is shared and {CONTROL} did not start ({failure}): {_WITHOUT}"
        return
    before = {name: os.environ.get(name) for name in daemon.variables}  # theirs may be of a daemon that is gone
    os.environ.update(daemon.variables)
    try:
        yield None
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        daemon.stop()


class _Daemon:
    """In the foreground, as a child: the kernel ends it with this process, however that ends, and its servers end with
    it (seen with driver 580). A session of its own: Ctrl-C in the terminal is for the launcher, whose workers need it
    while they drain."""

    def __init__(self, control: str, directory: Path) -> None:
        self._control = control
        self._pipe, self._logs = _private(directory / "mps"), _private(directory / "mps-log")
        self._words = self._logs / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.variables = {PIPE_VARIABLE: str(self._pipe), LOG_VARIABLE: str(self._logs)}

    def start(self) -> str | None:
        """None once it listens, else why it does not: then nothing of it is left."""
        try:
            with self._words.open("wb") as words:
                self._process = subprocess.Popen(
                    dying_with_us([self._control, "-f"]), stdin=subprocess.DEVNULL, stdout=words,
                    stderr=subprocess.STDOUT, env=_of_daemon() | self.variables, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            return str(error)
        try:
            return self._becomes_ready(self._process)
        except BaseException:
            self._kill()
            raise

    def stop(self) -> None:
        """Its clients have ended. Bounded."""
        if self._ends_within(0.0):
            self._warn_of_early_end()
            return
        try:
            refusal = self._refusal_to_quit()
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        else:
            if self._ends_within(_TIMEOUT_S if refusal is None else _ENDING_S):
                if refusal is not None:  # it was ending as it was asked: nobody listened any more
                    self._warn_of_early_end()
                return
            why = refusal or f"it is still there {_TIMEOUT_S:.0f} s after it was told to"
        logger.warning("%s did not end and is killed: %s", CONTROL, why)
        self._kill()

    def _ends_within(self, timeout_s: float) -> bool:
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _warn_of_early_end(self) -> None:
        assert self._process is not None
        how = describe_exit(self._process.returncode)
        logger.warning("%s ended before the launch (%s): %s", CONTROL, how, _WITHOUT)

    def _refusal_to_quit(self) -> str | None:
        """None: it has been told to. Raises what `subprocess.run` does."""
        asked = subprocess.run(
            [self._control], input=b"quit\n", env=_of_daemon() | self.variables, capture_output=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        if asked.returncode == 0:
            return None
        return (asked.stderr or asked.stdout).decode(errors="replace").strip() or describe_exit(asked.returncode)

    def _becomes_ready(self, process: subprocess.Popen[bytes]) -> str | None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                words = self._words.read_text(errors="replace").strip().splitlines()
                return words[-1] if words else describe_exit(process.returncode)
            if listens(self._pipe / DEFAULT_PIPE.name):
                return None
            time.sleep(_POLL_S)
        self._kill()
        return f"it does not listen after {_TIMEOUT_S:.0f} s"

    def _kill(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with its servers
        self._process.wait()


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _of_daemon() -> dict[str, str]:
    """The environment, without a choice of GPUs by number."""
    visible = os.environ.get(VISIBLE_VARIABLE, "")
    by_number = all(each.strip().lstrip("-").isdecimal() for each in visible.split(","))
    return {name: value for name, value in os.environ.items() if name != VISIBLE_VARIABLE or not by_number}
