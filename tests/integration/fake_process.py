"""Stands in for a worker: `python -m tests.integration.fake_process BEHAVIOUR [FILE]`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.errors import ModelError
from cluster.process_events import Progress, Ready, emit, emit_failure

LIFE_S = 600  # longer than any test waits for an end


def main(behaviour: str, *rest: str) -> None:
    match behaviour:
        case "serve":
            signal.signal(signal.SIGTERM, _drain)
            _serve()
        case "crash-at-start":
            sys.stderr.write("looking for the weights\nthe weights are not here\n")
            sys.exit(3)
        case "fail-at-start":
            emit_failure(ModelError("missing tensor blk.3.attn_q.weight"))
            sys.exit(1)
        case "crash-once":
            marker = Path(rest[0])
            if marker.exists():
                signal.signal(signal.SIGTERM, _drain)
                _serve()
            emit(Ready(address="127.0.0.1:1"))
            sys.stderr.write("out of luck\n")
            sys.stderr.flush()
            while not marker.with_suffix(".go").exists():
                time.sleep(0.01)
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash-when-ready":
            emit(Ready(address="127.0.0.1:1"))
            while not Path(rest[0]).exists():
                time.sleep(0.01)
            sys.exit(9)
        case "never-ready":
            emit(Progress(what="loading", done=1, total=3))
            time.sleep(LIFE_S)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _serve()
        case "crash-with-child":
            child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LIFE_S})"])
            Path(rest[0]).write_text(str(child.pid))
            sys.exit(4)
        case "noisy":
            sys.stdout.write("x" * 200_000 + "\x1b[2Jno event\n")
            sys.stdout.write('{"event":"ready","address":5}\n')
            sys.stdout.flush()
            signal.signal(signal.SIGTERM, _drain)
            _serve()
        case _:
            raise ValueError(behaviour)


def _serve() -> None:
    emit(Progress(what="loading", done=0, total=2))
    emit(Progress(what="loading", done=2, total=2))
    emit(Ready(address="127.0.0.1:1", detail=f"pid {os.getpid()}"))
    time.sleep(LIFE_S)


def _drain(*_: object) -> None:
    sys.stderr.write("drained\n")
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
