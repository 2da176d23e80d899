"""What changes where a process has a share of a GPU's multiprocessors (MPS)."""

from __future__ import annotations

import os

SHARE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def library_serves() -> bool:
    """False in a process that has a share: cuBLASLt leaves parts of some results unwritten there (cuBLAS 13, H200, 60 %
    of the multiprocessors: at 37 shapes in one start). Comparing bits finds that, but what fails in silence is better
    not asked at all."""
    share = os.environ.get(SHARE_VARIABLE, "")
    try:
        return not share or float(share) >= 100
    except ValueError:
        return False  # whatever the driver makes of it
