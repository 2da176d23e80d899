"""The operations of one device: `get_ops` is the entry point, `ops.py` the seam."""

from __future__ import annotations

from cluster.engine.kernels.ops import Ops
from cluster.errors import ConfigError

__all__ = ["Ops", "get_ops"]


def get_ops(device: str, num_threads: int | None = None) -> Ops:
    """The admitted operations for `device` ("cpu"). `num_threads` None: the cores this process may use.

    Raises `ConfigError` for a device this build has no kernels for.
    """
    match device.partition(":")[0]:
        case "cpu":
            from cluster.engine.kernels.cpu.arithmetic import InstructionClass
            from cluster.engine.kernels.cpu.reference import ReferenceOps

            return ReferenceOps(InstructionClass.FMA)
        case _:
            raise ConfigError(f"device: no kernels for {device!r}, known are 'cpu'")
