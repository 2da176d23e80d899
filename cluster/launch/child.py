"""Runs a module so that it dies with its launcher: `python -m cluster.launch.child PARENT_PID MODULE ...`.

The kernel sends SIGKILL when the parent is gone (PR_SET_PDEATHSIG, Linux). The setting survives execve,
so the module itself needs to know nothing of it. Standard library only: this runs before every start.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent_pid, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent_pid):  # it died before the call above
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-P", "-m", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
