"""Does NIXL move bytes between processes on this machine, and how fast?

Three processes: the doctor starts `--reader`, which may crash or hang without harm; that starts
`--source`, which lends its memory until its stdin ends. A container may allow a process to read its own
memory but not another's, so one process alone would prove nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from cluster.doctor.finding import Finding, broken, limited, ok
from cluster.errors import StartupError, TransferFailed

if TYPE_CHECKING:
    import torch

    from kvconnector.base import PeerDescription

NAME = "KV transport"
PROBE_BYTES = 64 << 20
NUM_PIECES = 16
TIMEOUT_S = 120.0
READ_TIMEOUT_S = 30.0
SLOW_GB_PER_S = 0.25
FIX = "reinstall it (pip install -c requirements.lock nixl); `cluster launch --monolithic` works without it"
FIX_READ = "a container needs --cap-add=SYS_PTRACE or shared memory (--shm-size=1g, --ipc=host)"
MODULE = [sys.executable, "-P", "-m", "cluster.doctor.hand_over"]


def transfer_check() -> Finding:
    """READs of 64 MiB from another process, compared byte for byte."""
    try:
        done = subprocess.run(
            [*MODULE, "--reader"], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return broken(NAME, f"the trial transfer did not end within {TIMEOUT_S:g} s", FIX_READ)
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=Finding)
    except msgspec.DecodeError:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        return broken(NAME, f"the trial ended with {done.returncode}: {' | '.join(words)}", FIX)


def run_reader() -> Finding:
    from kvconnector.base import PeerDescription

    with subprocess.Popen([*MODULE, "--source"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as source:
        assert source.stdin is not None
        assert source.stdout is not None
        try:
            peer = msgspec.json.decode(source.stdout.readline(), type=PeerDescription)
            return _read_from(peer)
        except msgspec.DecodeError:
            return broken(NAME, "NIXL could not be started", FIX)
        except (ImportError, StartupError) as error:
            return broken(NAME, str(error), FIX)
        except TransferFailed as error:
            return broken(NAME, error.message, FIX_READ)
        finally:
            source.stdin.close()


def run_source() -> None:
    import torch

    from kvconnector.nixl import NixlTransport, configure_environment

    configure_environment(torch.device("cpu"))
    transport = NixlTransport("doctor-source")
    memory = _pattern()
    transport.register("kv", memory)
    sys.stdout.write(msgspec.json.encode(transport.describe()).decode() + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    transport.close()


def _read_from(peer: PeerDescription) -> Finding:
    import torch

    from kvconnector.base import Piece, TransferState
    from kvconnector.nixl import NixlTransport, configure_environment

    configure_environment(torch.device("cpu"))
    transport = NixlTransport("doctor-reader")
    target = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    transport.register("kv", target)
    peer_id = transport.connect(peer)
    piece_bytes = PROBE_BYTES // NUM_PIECES
    pieces = [Piece(i * piece_bytes, i * piece_bytes, piece_bytes) for i in range(NUM_PIECES)]
    seconds = 0.0
    for _ in range(2):  # the first one sets the connection up, the second one is timed
        target.zero_()
        start = time.perf_counter()
        transfer = transport.read(peer_id, "kv", "kv", pieces)
        while (state := transport.poll(transfer)) is TransferState.RUNNING:
            if time.perf_counter() - start > READ_TIMEOUT_S:
                raise TransferFailed(f"a READ between two processes did not end within {READ_TIMEOUT_S:g} s")
        if state is TransferState.FAILED:
            raise TransferFailed("a READ between two processes failed")
        seconds = time.perf_counter() - start
    transport.disconnect(peer_id)
    transport.close()
    if not torch.equal(target, _pattern()):
        return broken(NAME, "a READ between two processes brought other bytes than were there", FIX)
    return judge_speed(PROBE_BYTES / seconds / 1e9)


def judge_speed(gb_per_s: float) -> Finding:
    detail = f"NIXL over UCX: 64 MiB read from another process and compared, {gb_per_s:.1f} GB/s"
    return ok(NAME, detail) if gb_per_s >= SLOW_GB_PER_S else limited(NAME, f"{detail}: slow", FIX_READ)


def _pattern() -> torch.Tensor:
    import torch

    return torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    if sys.argv[1:] == ["--source"]:
        run_source()
    else:
        sys.stdout.write(msgspec.json.encode(run_reader()).decode() + "\n")
