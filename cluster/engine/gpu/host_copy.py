"""What host and device tell each other without either waiting for the other."""

from __future__ import annotations

import torch

NUM_BUFFERS = 3  # steps whose host side may be alive: one that runs, one that is queued, one that is built


class Moment:
    """A point in the stream of a device, to wait for. On a CPU, whose operations are done when they return,
    it is always past: the kernels' interpreter runs there."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """Move it to here in the current stream."""
        if self._event is not None:
            self._event.record()

    def is_past(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def pinned_zeros(count: int, device: torch.device) -> torch.Tensor:
    """int32 host memory that `device` copies from without a detour, and that its kernels read and write in place."""
    return torch.zeros(count, dtype=torch.int32, pin_memory=device.type == "cuda")


class HostCopy:
    """A device tensor on its way to pinned memory, in stream order. `host` may be read after an event that
    was recorded later on the same stream; until then this object keeps the device's memory from reuse."""

    __slots__ = ("_source", "host")

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self.host.copy_(source, non_blocking=True)
