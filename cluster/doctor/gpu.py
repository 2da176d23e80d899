"""NVIDIA GPUs: whether this torch reaches them, what is free on each, and whether kernels can be compiled for them.

A machine serves without: nothing here is broken, at worst limited.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cluster.doctor.finding import Finding, limited, ok
from cluster.gpu_share import has_mps
from cluster.launch.external_facts import visible_gpus

GIB = 1 << 30
MEASURED = (9, 0)  # compute capability of Hopper
LEAST = (8, 0)  # multiplies bf16
_IDLE_BYTES = 2 * GIB  # contexts and libraries of a GPU that nobody uses take less


class Gpu(NamedTuple):
    """What is judged of one."""

    number: int
    name: str
    capability: tuple[int, int]
    total: int  # bytes
    free: int
    has_plans: bool  # a table of measured plans


def examined(devices: Path = Path("/dev")) -> Iterator[Finding]:
    """Nothing where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        count = visible_gpus(os.environ, devices)
        if count:
            yield unreachable(count, torch.__version__, torch.version.cuda)
        return
    yield compilers()
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # torch's own errors are of this class
            first = str(error).partition("\n")[0]
            yield limited(f"cuda:{index}", f"it cannot be used: {first}", "`nvidia-smi` shows its state and who has it")
            continue
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        yield judge(Gpu(index, properties.name, capability, total, free, has_plans(properties.name)))
    yield sharing(is_served=has_mps())


def unreachable(count: int, torch_version: str, cuda_version: str | None) -> Finding:
    what = f"{count} NVIDIA {'device' if count == 1 else 'devices'}, and torch {torch_version} reaches none"
    if cuda_version is None:
        return limited("GPU", f"{what}: it is built without CUDA", "install a torch with CUDA (docs/gpu.md)")
    fix = f"`nvidia-smi` must run, with a driver for CUDA {cuda_version}; CUDA_VISIBLE_DEVICES must name what is there"
    return limited("GPU", what, fix)


def compilers() -> Finding:
    """What Triton needs: its package, and a C compiler for the launchers that it builds."""
    if importlib.util.find_spec("triton") is None:
        return limited("GPU kernels", "the package triton is missing", "install a torch with CUDA, which brings it")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return limited("GPU kernels", "no C compiler, which Triton builds launchers with", "install gcc, or set CC")
    return ok("GPU kernels", f"Triton, launchers by {compiler}")


def has_plans(name: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from cluster.engine.kernels.triton.table import find_table

    return find_table(name, "") is not None


def judge(gpu: Gpu) -> Finding:
    name, (major, minor) = f"cuda:{gpu.number}", gpu.capability
    detail = f"{gpu.name}, sm_{major}{minor}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    if gpu.capability < LEAST:
        return limited(name, f"{detail}: it does not multiply bf16", "nothing to repair: serve on another GPU or a CPU")
    if gpu.total - gpu.free > _IDLE_BYTES:
        fix = (
            "`nvidia-smi` shows who has it; what is free can be served from with `engine.gpu_memory_fraction` or "
            "`engine.kv_cache_bytes`"
        )
        return limited(name, f"{detail}: other processes use it", fix)
    if not gpu.has_plans:
        measured = "" if gpu.capability[0] == MEASURED[0] else ", kernels were measured on sm_90 only"
        fix = "answers are right; for speed, measure plans once: `python -m benchmarks.gpu.tune_rows` (docs/gpu.md)"
        return limited(name, f"{detail}: no plans were measured on it{measured}", fix)
    return ok(name, detail)


def sharing(*, is_served: bool) -> Finding:
    if is_served:
        return ok("MPS", "a daemon runs: processes compute side by side on a GPU")
    return ok("MPS", "no daemon runs; `cluster launch` starts one where its workers share a GPU")
