"""cuBLASLt, admitted for one exact product at a time.

The library picks its algorithm by shape, so equal bits at 1,024 rows say nothing about 1,023. A product
(weight shape, rows, result type) is compared with the reference chain when it is first asked for, on
inputs that reveal another order of the sum, and served by the library only if every bit is equal. A
runner asks for all row counts it will use before it serves (`CudaModelRunner.warm_up`); while a graph is
captured nothing can be compared, and what was not admitted by then is not served by the library.
"""

from __future__ import annotations

import logging

import torch

from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR

logger = logging.getLogger(__name__)

_MAX_COMPARED_OUTPUTS = 4096  # columns of a comparison: every tile of the library shows among them


class LibraryAdmission:
    """Verdicts of one process on one device."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[int, int, int, torch.dtype], bool] = {}

    @property
    def num_refused(self) -> int:
        return sum(not admitted for admitted in self._verdicts.values())

    def admits(self, weight_NK: torch.Tensor, num_rows: int, out_dtype: torch.dtype) -> bool:
        key = (*weight_NK.shape, num_rows, out_dtype)
        verdict = self._verdicts.get(key)
        if verdict is None:
            if torch.cuda.is_current_stream_capturing():
                return False
            verdict = self._verdicts[key] = _is_equal(weight_NK, num_rows, out_dtype)
            if not verdict:
                logger.warning("cuBLASLt is not used for %d x %d x %d: its bits differ", num_rows, *weight_NK.shape)
        return verdict


def library_linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor) -> None:
    if out_TN.dtype == x_TK.dtype:
        torch.mm(x_TK, weight_NK.t(), out=out_TN)
    else:
        torch.mm(x_TK, weight_NK.t(), out_dtype=out_TN.dtype, out=out_TN)


def _is_equal(weight_NK: torch.Tensor, num_rows: int, out_dtype: torch.dtype) -> bool:
    """The model's own weight, and rows whose neighbouring products cancel. The library computes all columns,
    the reference as many as are compared: first and last ones, where tiles begin and end."""
    generator = torch.Generator(device=weight_NK.device).manual_seed(num_rows)
    shape = (num_rows, weight_NK.shape[1])
    x_TK = torch.randn(shape, generator=generator, device=weight_NK.device, dtype=torch.float32)
    x_TK[:, 1::2] -= x_TK[:, ::2][:, : x_TK[:, 1::2].shape[1]] * 0.99
    x_TK = x_TK.to(weight_NK.dtype)
    served = torch.empty((num_rows, weight_NK.shape[0]), dtype=out_dtype, device=weight_NK.device)
    library_linear(x_TK, weight_NK, served)
    half = min(_MAX_COMPARED_OUTPUTS // 2, weight_NK.shape[0])
    return all(
        torch.equal(_reference(x_TK, weight_NK[part], out_dtype), served[:, part])
        for part in (slice(0, half), slice(weight_NK.shape[0] - half, weight_NK.shape[0]))
    )


def _reference(x_TK: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty((x_TK.shape[0], weight_NK.shape[0]), dtype=out_dtype, device=x_TK.device)
    launch.run_linear(x_TK, weight_NK, None, out, REFERENCE_LINEAR)
    return out
