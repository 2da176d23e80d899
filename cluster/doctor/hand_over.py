"""Does NIXL move bytes on this machine, and how fast? Tried in a process of its own, which may crash or hang.

Run as `python -m cluster.doctor.hand_over` it prints one finding as JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time

import msgspec

from cluster.doctor.finding import Finding, broken, limited, ok

NAME = "KV transport"
PROBE_BYTES = 64 << 20
NUM_PIECES = 16
TIMEOUT_S = 90.0
TRANSFER_TIMEOUT_S = 30.0
SLOW_GB_PER_S = 0.5
FIX = "reinstall it (pip install -c requirements.lock nixl); `cluster launch --monolithic` works without it"


def transfer_check() -> Finding:
    """A READ of 64 MiB between two NIXL agents, compared byte for byte."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cluster.doctor.hand_over"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return broken(NAME, f"the trial transfer did not end within {TIMEOUT_S:g} s", FIX)
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else b"", type=Finding)
    except msgspec.DecodeError:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        return broken(NAME, f"the trial ended with {done.returncode}: {' | '.join(words)}", FIX)


def try_transfer() -> Finding:
    import torch

    from cluster.errors import TransferFailed
    from kvconnector.base import Piece, TransferState
    from kvconnector.nixl import NixlTransport

    source = torch.arange(PROBE_BYTES, dtype=torch.int64).to(torch.uint8)
    target = torch.zeros_like(source)
    piece_bytes = PROBE_BYTES // NUM_PIECES
    pieces = [Piece(i * piece_bytes, i * piece_bytes, piece_bytes) for i in range(NUM_PIECES)]
    try:
        prefill, decode = NixlTransport("doctor-prefill"), NixlTransport("doctor-decode")
        prefill.register("kv", source)
        decode.register("kv", target)
        peer = decode.connect(prefill.describe())
        seconds = []
        for _ in range(2):  # the first one sets the connection up
            start = time.perf_counter()
            transfer = decode.read(peer, "kv", "kv", pieces)
            while (state := decode.poll(transfer)) is TransferState.RUNNING:
                if time.perf_counter() - start > TRANSFER_TIMEOUT_S:
                    return broken(NAME, f"a READ did not end within {TRANSFER_TIMEOUT_S:g} s", FIX)
            seconds.append(time.perf_counter() - start)
            if state is TransferState.FAILED:
                return broken(NAME, "a READ between two NIXL agents failed", FIX)
        decode.disconnect(peer)
        decode.close()
        prefill.close()
    except TransferFailed as error:
        return broken(NAME, error.message, FIX)
    if not torch.equal(source, target):
        return broken(NAME, "a READ between two NIXL agents brought other bytes than were there", FIX)
    speed = PROBE_BYTES / seconds[-1] / 1e9
    detail = f"NIXL {decode.name}: 64 MiB read and compared, {speed:.1f} GB/s"
    if speed < SLOW_GB_PER_S:
        return limited(NAME, detail, "slow: UCX found no shared memory; see `ucx_info -d` and the limits of /dev/shm")
    return ok(NAME, detail)


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(try_transfer()).decode() + "\n")
