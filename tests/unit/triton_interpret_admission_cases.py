"""The trials of real kernels in Triton's interpreter, through `CudaOps` on a device that is not there.

fp16 operands and fp32 results, as in `triton_interpret_cases.py`. On a GPU: tests/gpu/test_admission.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from cluster.engine.kernels import plan_admission
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import Scaling, quantize_weight, quantize_weight_blocks
from cluster.engine.kernels.probes_moe import random_choice
from cluster.engine.kernels.triton import (
    attention,
    attention_launch,
    fp8_launch,
    fp8_linear,
    launch,
    linear,
    moe,
    moe_launch,
)
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8PlanIndex, Fp8Table
from cluster.engine.kernels.triton.moe_plans import (
    REFERENCE_MOE,
    GroupedPlan,
    MoeEntry,
    MoePlan,
    MoePlanIndex,
    MoeShape,
    MoeTable,
)
from cluster.engine.kernels.triton.plans import REFERENCE_ATTENTION, REFERENCE_LINEAR, AttentionPlan, LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex, PlanTable
from tests.gpu.support import Paged, bits_equal, mutated

COPY_ENGINE = LinearPlan(kind="tma", block_m=16, block_n=32, block_k=64)
FEW = MoePlan(kind="few", block_m=32, gate_up=GroupedPlan(block_k=64), down=GroupedPlan(block_k=64))
FP8_COPY_ENGINE = Fp8Plan(kind="tma", block_m=64, block_n=32)
ATTENTION = AttentionPlan(prefill_block_rows=32, prefill_use_tma=True)
MOE_SHAPE = MoeShape(num_experts=6, top_k=2, hidden=64, features=64)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    """`CudaOps` whose tables name a plan of the copy engine for everything."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3)
    )  # fmt: skip
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name: None)
    monkeypatch.setattr(plan_admission, "_MAX_ROUNDS", 1)
    ops = CudaOps(torch.device("cpu"), residual_dtype=torch.float32, pdl=0)
    entries = [
        LinearEntry(out_features=1, in_features=1, max_rows=1, silu_mul=silu_mul, plan=COPY_ENGINE)
        for silu_mul in (False, True)
    ]
    ops.plans = PlanIndex(PlanTable(device="none", linear=tuple(entries), attention=ATTENTION))
    ops.moe_plans = MoePlanIndex(
        MoeTable(device="none", entries=(MoeEntry(shape=MOE_SHAPE, max_rows=32, plan=FEW),))
    )  # fmt: skip
    fp8_entry = Fp8Entry(out_features=1, in_features=1, max_rows=1, plan=FP8_COPY_ENGINE)
    ops.fp8.plans = Fp8PlanIndex(Fp8Table(device="none", linear=(fp8_entry,)))
    return ops


def run_linear(ops: CudaOps) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((9, 320), generator=generator).half()
    weight = ops.pack_linear(torch.randn((48, 320), generator=generator).half())
    bias = torch.randn(48, generator=generator).half()
    return torch.cat([ops.linear(x, weight, each, out_dtype=torch.float32) for each in (None, bias)])


def run_swiglu(ops: CudaOps) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((9, 320), generator=generator).half()
    weight = ops.pack_linear(torch.randn((96, 320), generator=generator).half() * 0.05)
    out = torch.empty((9, 48))
    ops._serve_linear(x, weight, None, out, COPY_ENGINE, silu_mul=True)  # `linear_silu_mul` gives bf16
    return out


def run_experts(ops: CudaOps) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((7, 64), generator=generator).half()
    gate_up = ops.pack_experts((torch.randn((6, 128, 64), generator=generator) / 8).half())
    down = ops.pack_experts((torch.randn((6, 64, 64), generator=generator) / 8).half())
    return ops.moe_experts(x, random_choice(7, 6, 2, seed=1), gate_up, down)


def run_fp8(ops: CudaOps) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight_NK = torch.randn((64, 600), generator=generator)
    x = torch.randn((5, 600), generator=generator)
    packed = [ops.pack_fp8(*quantize_weight(weight_NK)), ops.pack_fp8(*quantize_weight_blocks(weight_NK, 32))]
    return torch.cat([ops.linear(x, each, out_dtype=torch.float32) for each in packed])


def run_attention(ops: CudaOps, rows: list[int]) -> torch.Tensor:
    cache = Paged([1100, 70], num_heads=4, num_kv_heads=2, head_size=64, dtype=torch.float16, device="cpu")
    metadata = cache.metadata([0, 1], rows, cache.contexts)
    q = torch.cat([cache.q[i][context - rows[i] : context] for i, context in enumerate(cache.contexts)])
    return ops.attention(q, cache.layer, metadata, cache.scale)


def run_decode(ops: CudaOps) -> torch.Tensor:
    return run_attention(ops, [1, 1])


def run_prefill(ops: CudaOps) -> torch.Tensor:
    return run_attention(ops, [80, 33])


def with_references(ops: CudaOps) -> CudaOps:
    linear_entries = [
        LinearEntry(out_features=1, in_features=1, max_rows=1, silu_mul=silu_mul, plan=REFERENCE_LINEAR)
        for silu_mul in (False, True)
    ]
    ops.plans = PlanIndex(PlanTable(device="none", linear=tuple(linear_entries), attention=REFERENCE_ATTENTION))
    ops.moe_plans = MoePlanIndex(
        MoeTable(device="none", entries=(MoeEntry(shape=MOE_SHAPE, max_rows=32, plan=REFERENCE_MOE),))
    )  # fmt: skip
    ops.fp8.plans = Fp8PlanIndex(
        Fp8Table(device="none", linear=(Fp8Entry(out_features=1, in_features=1, max_rows=1, plan=REFERENCE_FP8),))
    )  # fmt: skip
    return ops


OPERATIONS: dict[str, Callable[[CudaOps], torch.Tensor]] = {
    "linear": run_linear,
    "swiglu": run_swiglu,
    "experts": run_experts,
    "fp8": run_fp8,
    "decode": run_decode,
    "prefill": run_prefill,
}
# The launched kernel of each plan above; where it stands, and a mistake in it: K, or splits, in another order.
KERNELS: dict[str, tuple[Any, ModuleType, str, list[tuple[str, str]]]] = {
    "linear": (launch, linear, "tma_kernel", [("load([row, k])", "load([row, (K - 1) // BLOCK_K * BLOCK_K - k])"),
               ("load([column, k])", "load([column, (K - 1) // BLOCK_K * BLOCK_K - k])")]),
    "experts": (moe_launch, moe, "few_kernel", []),
    "fp8": (fp8_launch, fp8_linear, "fp8_tma_kernel", []),
    "decode": (attention_launch, attention, "split_kernel",
               [("(before + split) * NUM", "(before + num_splits - 1 - split) * NUM")]),
    "prefill": (attention_launch, attention, "prefill_kernel", []),
}  # fmt: skip
KERNELS["swiglu"] = KERNELS["linear"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("name", OPERATIONS)
def test_plans_with_the_reference_s_bits_are_admitted_and_tried_once(
    name: str, ops: CudaOps, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    OPERATIONS[name](ops)
    assert ops.admission.refusals == []
    assert warnings_of(caplog) == []
    monkeypatch.setattr(ops.admission, "_refusal", None)  # nothing is left to be tried
    found = OPERATIONS[name](ops)
    assert bits_equal(found, OPERATIONS[name](with_references(ops)))
