"""Whether processes of this machine still run, ours or not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path


def is_running(pid: int) -> bool:
    """Not one that has ended and is not waited for yet. It may go while it is looked at."""
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(errors="replace")
    return False


def wait_gone(pids: Sequence[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)
