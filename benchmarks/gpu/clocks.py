"""SM clock and power of the CUDA device in use, as NVML tells them, and what its tensor cores could do at a clock."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

MULTIPROCESSORS = 132
FP8_FLOP_PER_CLOCK = 8192  # of a multiprocessor, dense
BF16_FLOP_PER_CLOCK = 4096
_POWER_INSTANT = 186  # NVML's field; what it calls the power usage is a mean over a second, which mixes turns


class Sample(NamedTuple):
    """NaN: not known."""

    mhz: float
    watts: float


UNKNOWN = Sample(math.nan, math.nan)


def sampler() -> Callable[[], Sample]:
    """Reads the current device; without NVML nothing is known."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return lambda: UNKNOWN
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    try:
        nvml.nvmlInit()
        # its own numbers of devices do not heed CUDA_VISIBLE_DEVICES
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except nvml.NVMLError as error:
        print(f"no clocks and no power: {error}")
        return lambda: UNKNOWN

    def sample() -> Sample:
        try:
            mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            field = nvml.nvmlDeviceGetFieldValues(handle, [_POWER_INSTANT])[0]
            has_instant = field.nvmlReturn == nvml.NVML_SUCCESS
            return Sample(mhz, (field.value.uiVal if has_instant else nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3)
        except nvml.NVMLError:
            return UNKNOWN

    return sample


def peak_share(flop: float, milliseconds: float, mhz: float, flop_per_clock: int) -> float:
    """Of what all tensor cores could do in that time at that clock."""
    return flop / (milliseconds * mhz * 1e3 * MULTIPROCESSORS * flop_per_clock)
