"""How processes share a GPU, with or without NVIDIA's Multi-Process Service (MPS): what a launcher says in their
environment, and what changes for a process that reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SHARE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
DEFAULT_PIPE = Path("/tmp/nvidia-mps/control")  # where CUDA looks if the variable is not set


def has_mps(environment: Mapping[str, str] = os.environ, default_pipe: Path = DEFAULT_PIPE) -> bool:
    """Whether kernels of processes started here, this one included, run beside those of others on their GPU, and do not
    take turns with them. A launcher that has started no daemon yet asks for one of the operator's."""
    return PIPE_VARIABLE in environment or default_pipe.exists()


def library_serves() -> bool:
    """False in a process that has a share: cuBLASLt leaves parts of some results unwritten there (cuBLAS 13, H200, 60 %
    of the multiprocessors: at 37 shapes in one start). Comparing bits finds that, but what fails in silence is better
    not asked at all."""
    share = os.environ.get(SHARE_VARIABLE, "")
    try:
        return not share or float(share) >= 100
    except ValueError:
        return False  # whatever the driver makes of it
