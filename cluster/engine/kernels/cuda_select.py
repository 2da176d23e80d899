"""Checks that a CUDA device can be used, before anything that needs one is imported."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.engine.kernels.cuda_ops import CudaOps


def make_cuda_ops(device: str) -> CudaOps:
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

    return CudaOps(torch.device("cuda", index))
