"""In which type the residual stream is kept. It decides bits, so it hangs on the model and the configuration alone.

Each layer adds to the stream, and what bf16 rounds off it goes into every logit. In fp32 nothing is rounded between
layers, for 1 to 4 % of a GPU's time where few sequences decode, and 6 to 15 % at 256 (`benchmarks.gpu.residual`). Small
models get it: their choices are near enough to each other for it to show. A CPU's kernels know fp32 only.
"""

from __future__ import annotations

from typing import Literal

import torch

from cluster.errors import ConfigError

ResidualName = Literal["bfloat16", "float32"]

WIDEST_IN_FLOAT32 = 1024  # features of a model that is not told


def residual_dtype(asked: ResidualName | None, device: str, hidden_size: int) -> torch.dtype:
    """`asked`: of the configuration. Raises `ConfigError` if the device has no kernels for it."""
    if device.startswith("cuda"):
        is_wide = hidden_size > WIDEST_IN_FLOAT32
        return torch.bfloat16 if (asked == "bfloat16" if asked else is_wide) else torch.float32
    if asked == "bfloat16":
        raise ConfigError(
            "model.residual_dtype: bfloat16 is for GPUs, the kernels of a CPU keep the residual stream in float32; "
            "leave it out"
        )
    return torch.float32
