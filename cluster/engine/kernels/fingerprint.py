"""The numeric fingerprint: equal on two machines exactly if their kernels give the same bits (on the probes).

A precondition of pairing a prefill with a decode worker in invariant mode.
"""

from __future__ import annotations

import hashlib

from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probe_lists import ALL_PROBES
from cluster.engine.kernels.registry import bits, one_torch_thread


def fingerprint(ops: Ops) -> str:
    """`<name of the instruction class>/<hash>` of every operation's bits on seeded inputs.

    The same for any process and thread count, and whether a kernel or its reference serves.
    """
    digest = hashlib.sha256()
    with one_torch_thread():
        for probe in ALL_PROBES:
            digest.update(probe.name.encode())
            for output in probe.run(ops):
                digest.update(bits(output.cpu()).numpy().tobytes())
    return f"{ops.name}/{digest.hexdigest()[:32]}"
