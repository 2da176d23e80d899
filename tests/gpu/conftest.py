"""Everything here needs a CUDA device and Triton; without them the whole folder is skipped."""

from __future__ import annotations

import importlib.util

import pytest
import torch

_HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if _HAS_GPU else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
