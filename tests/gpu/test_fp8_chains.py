"""Chains of several groups in the tensor core (`fp8.CHANNEL_CHAIN`): one definition for all kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.fp8_layers import HardOperands
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan
from tests.gpu.support import bits_equal, num_differing
from tests.gpu.test_fp8 import PLANS

OUTPUTS, INPUTS = 1008, 1664  # 13 groups, so the last chain is filled up


@pytest.fixture(scope="module")
def layers() -> list[HardOperands]:
    fp8 = CudaOps(torch.device("cuda")).fp8
    return [HardOperands(fp8, OUTPUTS, INPUTS, 300, seed=7, reveals_order=reveals) for reveals in (False, True)]


@pytest.mark.parametrize("chain", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kind}{plan.block_n}")
def test_every_kernel_sums_chains_alike(layers: list[HardOperands], plan: Fp8Plan, chain: int) -> None:
    for layer in layers:
        for num_rows in (1, 70, 300):
            for silu_mul, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                found, expected = (
                    layer.run(used, num_rows, dtype, silu_mul=silu_mul, chain=chain) for used in (plan, REFERENCE_FP8)
                )
                assert bits_equal(found, expected), (num_rows, silu_mul)


@pytest.mark.parametrize("chain", [2, 4])
def test_longer_chains_are_another_definition(layers: list[HardOperands], chain: int) -> None:
    expected = layers[0].run(REFERENCE_FP8, 300, torch.float32, chain=1)
    assert num_differing(layers[0].run(REFERENCE_FP8, 300, torch.float32, chain=chain), expected) > 1000
