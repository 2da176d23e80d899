"""The two GEMM kernels for Hopper, compiled for an H100 that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from benchmarks.gpu.candidates import hopper, stream
from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.plans import LinearPlan
from tests.unit.triton_compile import compiled_for_hopper, spilled_bytes

SHARED_BYTES = 232_448  # of a block
ROWS = (64, 128, 192, 256, 8192)
SPILLED_BYTES = {(64, 128): 8, (256, 128): 128}  # of SwiGLU's largest tiles, by Triton 3.9; none by 3.6


def offered(num_rows: int, *, silu_mul: bool) -> list[LinearPlan]:
    plans = [*stream(num_rows, silu_mul=silu_mul)] if num_rows <= 128 else []
    if num_rows > 64:
        plans += hopper(num_rows, silu_mul=silu_mul)
    return [plan for plan in plans if plan.swap or plan.block_m >= 64]


def deepest(num_rows: int, *, silu_mul: bool) -> list[LinearPlan]:
    """Of each tile the plan with the deepest ring: it takes the most registers and shared memory."""
    plans = sorted(offered(num_rows, silu_mul=silu_mul), key=lambda plan: plan.num_stages * plan.block_k)
    return list({(plan.block_m, plan.block_n, plan.swap): plan for plan in plans}.values())


CASES = {
    f"{plan.kind}, {plan.block_m} x {plan.block_n}, {plan.num_stages} stages{', SwiGLU' * silu_mul}": (plan, silu_mul)
    for num_rows in ROWS
    for silu_mul in (False, True)
    for plan in deepest(num_rows, silu_mul=silu_mul)
}


@pytest.mark.parametrize(("plan", "silu_mul"), CASES.values(), ids=CASES)
def test_products_fit_the_multiprocessor_and_run_on_wgmma(plan: LinearPlan, silu_mul: bool, tmp_path: Path) -> None:
    x = torch.zeros((plan.block_m, 512), dtype=torch.bfloat16)
    weight = torch.zeros((1024, 512), dtype=torch.bfloat16)
    with compiled_for_hopper(tmp_path) as kernels:
        for dtype in (torch.bfloat16,) if silu_mul else (torch.bfloat16, torch.float32):
            out = torch.empty((plan.block_m, 512 if silu_mul else 1024), dtype=dtype)
            launch.run_linear(x, weight, None, out, plan, silu_mul=silu_mul, num_programs=132, pdl=True)
    for kernel in kernels:
        check(kernel, SPILLED_BYTES.get((plan.block_m, plan.block_n), 0) if silu_mul else 0)


def check(kernel: Any, spilled: int) -> None:
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert not re.search(r"mma\.sync\.aligned", ptx)
    assert spilled_bytes(kernel) <= spilled
    assert kernel.metadata.shared <= SHARED_BYTES
    first_load = re.search(r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global", ptx)
    assert first_load is not None
    assert first_load.start() < ptx.index("griddepcontrol.wait"), "weights are asked for before the wait"
