"""What a rank tells about the host it runs on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from cluster.control.worker_config import ADVERTISED_HOST_VARIABLE
from cluster.launch.cores import usable_cores
from cluster.launch.external_parts import Seat


def own_seat() -> Seat:
    """Of this process; its address is for others to see."""
    return Seat(
        host=platform.node(),
        address="",
        num_cores=usable_cores(),
        cpus=frozenset(os.sched_getaffinity(0)),
        num_gpus=visible_gpus(os.environ),
        advertised_host=os.environ.get(ADVERTISED_HOST_VARIABLE, ""),
    )


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """How many CUDA devices a child of this process would see, without asking the driver."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(list(devices.glob("nvidia[0-9]*")))
    names = [name.strip() for name in chosen.split(",")]
    # CUDA, too, stops at the first name that is none.
    return next((index for index, name in enumerate(names) if not name or name.startswith("-")), len(names))
