"""What a process does when it says that it is ready."""

from __future__ import annotations

import subprocess
import sys

from cluster.process_events import Ready, parse

_SERVES = """
import gc
from cluster.process_events import emit_ready
loaded = [[] for _ in range(100_000)]
lost = []
lost.append(lost)
del lost
emit_ready("127.0.0.1:1", "all of it")
looked_at = len(gc.get_objects())
print(looked_at, gc.collect())
"""


def test_what_is_loaded_when_a_process_is_ready_is_not_looked_at_by_later_collections() -> None:
    run = subprocess.run([sys.executable, "-c", _SERVES], capture_output=True, text=True, check=True, timeout=60)
    ready, counts = run.stdout.splitlines()
    assert parse(ready) == Ready(address="127.0.0.1:1", detail="all of it")
    num_looked_at, num_found = map(int, counts.split())
    assert num_looked_at < 1000
    assert num_found == 0, "garbage of the start was collected before"
