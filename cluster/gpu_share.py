"""How processes share a GPU, with or without NVIDIA's Multi-Process Service (MPS): what a launcher says in their
environment, and what changes for a process that reads it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

SHARE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
DEFAULT_PIPE = Path("/tmp/nvidia-mps/control")  # where CUDA looks if the variable is not set


def has_mps(environment: Mapping[str, str] = os.environ, default_pipe: Path = DEFAULT_PIPE) -> bool:
    """Whether kernels of processes started here, this one included, run beside those of others on their GPU, and do not
    take turns with them. A launcher that has started no daemon yet asks for one of the operator's."""
    directory = environment.get(PIPE_VARIABLE)
    control = default_pipe if directory is None else Path(directory) / default_pipe.name
    return (directory is not None or control.exists()) and not _is_deserted(control)


def listens(control: Path) -> bool:
    """Whether there is a daemon behind this socket."""
    return control.is_socket() and not _is_deserted(control)


def _is_deserted(control: Path) -> bool:
    """Whether this is the socket of a daemon that is gone. One that was killed leaves it behind; CUDA goes on without
    MPS then, and says nothing. Only a refusal tells: whatever else hinders us need not hinder CUDA."""
    if not control.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(str(control))
        except ConnectionRefusedError:
            return True
        except OSError:  # a socket of another type, a full queue, no permission, too long a path
            return False
    return False


def library_serves() -> bool:
    """False in a process that has a share: cuBLASLt leaves parts of some results unwritten there (cuBLAS 13, H200, 60 %
    of the multiprocessors: at 37 shapes in one start). Comparing bits finds that, but what fails in silence is better
    not asked at all."""
    share = os.environ.get(SHARE_VARIABLE, "")
    try:
        return not share or float(share) >= 100
    except ValueError:
        return False  # whatever the driver makes of it
