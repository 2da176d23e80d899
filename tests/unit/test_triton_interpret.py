"""Starts the `triton_interpret_*_cases.py` in a process where Triton interprets kernels on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 900  # of one file of cases, which takes up to a minute on an idle machine
CASES = sorted(path.name for path in Path(__file__).parent.glob("triton_interpret_*cases.py"))


@pytest.mark.timeout(LIMIT_S + 100)
@pytest.mark.parametrize("cases", CASES)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter(cases: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-p", "no:cacheprovider", "--timeout", str(LIMIT_S)]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(cases))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
