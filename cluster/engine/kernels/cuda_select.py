"""Checks that a CUDA device can be used, before anything that needs one is imported."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from cluster.errors import ConfigError
from cluster.model_files.cache import cache_location

if TYPE_CHECKING:
    from cluster.engine.kernels.cuda_ops import CudaOps


_TRITON_VARIABLES = ("TRITON_CACHE_DIR", "TRITON_HOME")  # where Triton keeps what it compiled


def keep_compiled_kernels() -> None:
    """For a process of ours: Triton's cache lies in ours unless the environment names a place. Compiling is most of a
    first start (minutes); on a volume that is kept, or that pods share, it happens once. A cache that cannot be
    written is left to Triton's own default."""
    if any(name in os.environ for name in _TRITON_VARIABLES):
        return
    directory = cache_location() / "triton"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK | os.X_OK):
        os.environ["TRITON_CACHE_DIR"] = str(directory)


def make_cuda_ops(device: str, residual_dtype: torch.dtype) -> CudaOps:
    """The operations of "cuda" or "cuda:N". `ConfigError` names what is missing."""
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} was asked for, and torch {torch.__version__} finds no CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"device: {device!r} needs the package 'triton', which comes with CUDA builds of torch")
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} was asked for, and there are {torch.cuda.device_count()} CUDA devices")

    from cluster.engine.kernels.cuda_ops import CudaOps

    return CudaOps(torch.device("cuda", index), residual_dtype=residual_dtype)
