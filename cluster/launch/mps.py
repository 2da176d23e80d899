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
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.gpu_share import DEFAULT_PIPE, PIPE_VARIABLE, has_mps

logger = logging.getLogger(__name__)

LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
CONTROL = "nvidia-cuda-mps-control"
# Numbers in it count all GPUs for a worker, but would count the daemon's own choice of them if it had one. UUIDs mean
# the same to both, and a slice of a GPU (MIG) must be named to the daemon.
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_TIMEOUT_S = 20.0
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
    if shutil.which(CONTROL) is None:
        yield f"a GPU is shared and {CONTROL} is not installed: {_WITHOUT}"
        return
    environment = {PIPE_VARIABLE: str(_private(directory / "mps")), LOG_VARIABLE: str(_private(directory / "mps-log"))}
    failure = _control(["-d"], environment)
    if failure is not None:
        _control([], environment, "quit\n")  # it may have started all the same, too late
        yield f"a GPU is shared and {CONTROL} did not start ({failure}): {_WITHOUT}"
        return
    before = {name: os.environ.get(name) for name in environment}  # theirs may be of a daemon that is gone
    os.environ.update(environment)
    try:
        yield None
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        failure = _control([], environment, "quit\n")
        if failure is not None:
            logger.warning("%s did not end: %s", CONTROL, failure)


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def _of_daemon() -> dict[str, str]:
    """The environment, without a choice of GPUs by number."""
    visible = os.environ.get(VISIBLE_VARIABLE, "")
    by_number = all(each.strip().lstrip("-").isdecimal() for each in visible.split(","))
    return {name: value for name, value in os.environ.items() if name != VISIBLE_VARIABLE or not by_number}


def _control(arguments: list[str], environment: dict[str, str], command: str = "") -> str | None:
    """None if it worked, else why not."""
    try:
        done = subprocess.run(
            [CONTROL, *arguments],
            input=command,
            env=_of_daemon() | environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
