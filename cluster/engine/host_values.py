"""Values of the host on their way to where a step computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[np.generic[Any]], device: torch.device) -> torch.Tensor:
    """A tensor of the same values, which nothing waits for: through pinned memory, which torch's host allocator keeps
    until the copy is done. From any other memory torch would wait for all that the device has been given before. On a
    CPU it may share the memory of `values`."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
