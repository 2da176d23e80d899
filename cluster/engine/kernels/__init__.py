"""The operations of one device. `get_ops` is the entry point, `ops.py` the seam.

Every kernel behind it has passed bit-exact admission (`registry.py`); `fingerprint` sums up the bits a
process computes with, and `kernel_report` tells which kernels were admitted and why others were not.
"""

from __future__ import annotations

import os

import torch

from cluster.engine.kernels.fingerprint import fingerprint
from cluster.engine.kernels.mutations import BREAK_VARIABLE, break_kernel
from cluster.engine.kernels.ops import AttentionMetadata, ExpertChoice, ExpertWeight, LinearWeight, Ops
from cluster.engine.kernels.registry import Admission
from cluster.errors import ConfigError

__all__ = [
    "Admission",
    "AttentionMetadata",
    "ExpertChoice",
    "ExpertWeight",
    "LinearWeight",
    "Ops",
    "fingerprint",
    "get_ops",
    "kernel_report",
]


def get_ops(device: str, num_threads: int | None = None, residual_dtype: torch.dtype | None = None) -> Ops:
    """The admitted operations for `device` ("cpu", "cuda", "cuda:1").

    `residual_dtype`: of a GPU's residual stream, bf16 if None; a CPU's is fp32 (`models/residual.py` chooses).
    `num_threads` bounds the CPU threads of a kernel; None: one for each core this process may use. The
    CPU's instruction class is the best there is, or the one named in TANDEM_CPU_ISA.
    Raises `ConfigError` for a device without kernels or an unusable TANDEM_CPU_ISA.
    """
    ops = _device_ops(device, num_threads, residual_dtype)
    broken = os.environ.get(BREAK_VARIABLE)
    return break_kernel(ops, broken) if broken else ops


def kernel_report(device: str) -> list[Admission]:
    """The verdict on every candidate kernel of `device`, with the first difference of a refused one.

    Takes a second or two the first time on a machine. Raises as `get_ops` does.
    """
    match device.partition(":")[0]:
        case "cpu":
            from cluster.engine.kernels.cpu.select import report_cpu

            return report_cpu()
        case _:
            raise _unknown(device)


def _device_ops(device: str, num_threads: int | None, residual_dtype: torch.dtype | None) -> Ops:
    match device.partition(":")[0]:
        case "cpu":
            from cluster.engine.kernels.cpu.select import make_cpu_ops

            return make_cpu_ops(num_threads)
        case "cuda":
            from cluster.engine.kernels.cuda_select import make_cuda_ops

            return make_cuda_ops(device, residual_dtype or torch.bfloat16)
        case _:
            raise _unknown(device)


def _unknown(device: str) -> ConfigError:
    return ConfigError(f"device: no kernels for {device!r}, known are 'cpu' and 'cuda'")
