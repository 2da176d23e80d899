"""Runs a command so that it dies with its launcher: `python -m cluster.launch.child PARENT_PID COMMAND ...`.

The kernel sends SIGKILL when the parent is gone (PR_SET_PDEATHSIG, Linux). The setting survives execve,
so the command itself needs to know nothing of it. Standard library only: this runs before every start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def dying_with_us(command: Sequence[str]) -> list[str]:
    """`command`, a program and its arguments, as a child of this process that does not outlive the thread which
    starts it."""
    return [*python_module("cluster.launch.child"), str(os.getpid()), *command]


def python_module(*module_and_arguments: str) -> list[str]:
    """By this interpreter; no module is taken from the current directory."""
    return [sys.executable, "-P", "-m", *module_and_arguments]


def main(arguments: list[str]) -> None:
    parent_pid, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent_pid):  # it died before the call above
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
