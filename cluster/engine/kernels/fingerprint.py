"""The numeric fingerprint: equal on two machines exactly if their kernels give the same bits (on the probes).

A precondition of pairing a prefill with a decode worker in invariant mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probe_lists import ALL_PROBES, FP8_PROBES, LATENT_PROBES
from cluster.engine.kernels.registry import bits, one_torch_thread


def fingerprint(
    ops: Ops,
    *,
    with_fp8: bool = False,
    with_latent: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """`<name of the instruction class>/<hash>` of every operation's bits on seeded inputs.

    The same for any process and thread count, and whether a kernel or its reference serves. `with_fp8` is for
    a worker whose model has FP8 layers: only such a one needs a device that multiplies FP8. `with_latent` is for
    one whose model has latent attention: others need not compile its kernels. `progress` counts probes: on a GPU
    whose kernels are not in Triton's cache they take a minute.
    """
    digest = hashlib.sha256()
    probes = (*ALL_PROBES, *(FP8_PROBES if with_fp8 else ()), *(LATENT_PROBES if with_latent else ()))
    with one_torch_thread():
        for index, probe in enumerate(probes):
            progress(index, len(probes))
            digest.update(probe.name.encode())
            for output in probe.run(ops):
                digest.update(bits(output.cpu()).numpy().tobytes())
    return f"{ops.name}/{digest.hexdigest()[:32]}"
