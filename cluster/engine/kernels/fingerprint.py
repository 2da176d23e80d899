"""The numeric fingerprint: equal on two machines exactly if their kernels give the same bits (on the probes).

A precondition of pairing a prefill with a decode worker in invariant mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probe_lists import ALL_PROBES, FP8_PROBES, LATENT_PROBES
from cluster.engine.kernels.probes import Probe
from cluster.engine.kernels.registry import bits, one_torch_thread


def fingerprint(
    ops: Ops,
    *,
    with_fp8: bool = False,
    with_latent: bool = False,
    num_threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """`<name of the instruction class>/<hash>` of every operation's bits on seeded inputs.

    The same for any process and thread count, and whether a kernel or its reference serves. `with_fp8` is for
    a worker whose model has FP8 layers: only such a one needs a device that multiplies FP8. `with_latent` is for
    one whose model has latent attention: others need not compile its kernels. `progress` counts probes: on a GPU
    whose kernels are not in Triton's cache they take a minute, which `num_threads` threads share.
    """
    digest = hashlib.sha256()
    probes = (*ALL_PROBES, *(FP8_PROBES if with_fp8 else ()), *(LATENT_PROBES if with_latent else ()))
    with one_torch_thread():
        progress(0, len(probes))
        for index, (probe, outputs) in enumerate(zip(probes, probe_outputs(ops, probes, num_threads), strict=True)):
            digest.update(probe.name.encode())
            for output in outputs:
                digest.update(bits(output.cpu()).numpy().tobytes())
            progress(index + 1, len(probes))
    return f"{ops.name}/{digest.hexdigest()[:32]}"


def probe_outputs(ops: Ops, probes: Sequence[Probe], num_threads: int) -> Iterator[Sequence[torch.Tensor]]:
    """What each probe gives, in their order. Threads end before the iterator does."""
    if num_threads == 1:
        yield from (probe.run(ops) for probe in probes)
        return

    device = torch.empty(0, device=ops.device).device  # with an index, whether or not that of `ops` has one

    def start() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own

    with ThreadPoolExecutor(num_threads, thread_name_prefix="probe", initializer=start) as pool:
        yield from pool.map(lambda probe: probe.run(ops), probes)
