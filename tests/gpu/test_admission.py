"""Whatever plan serves, the bits are the same: over all probes, and for every entry of the device's table; a plan that
has others, or does not start, is named and does not serve."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.gemm import revealing_inputs
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.probe_lists import ALL_PROBES
from cluster.engine.kernels.probes import Magnitudes, draw
from cluster.engine.kernels.triton import launch
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, AttentionPlan, LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex, PlanTable
from cluster.gpu_share import SHARE_VARIABLE
from tests.gpu.support import bits_equal, num_differing
from tests.gpu.support_admission import (
    OPERATIONS,
    TooLarge,
    differing_probes,
    name_plans,
    plant,
    plant_mistake,
    with_references,
)

SWAPPED = LinearPlan(block_m=32, block_n=64, block_k=128, num_stages=3, swap=True)
COPY_ENGINE = LinearPlan(kind="tma", block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
PLAIN_ATTENTION = AttentionPlan(prefill_block_rows=16, split_num_stages=1, prefill_num_stages=1)


def ops_with(plan: LinearPlan | None, attention: AttentionPlan | None) -> CudaOps:
    """Operations where one plan serves every GEMM; None: as the table says."""
    ops = CudaOps(torch.device("cuda"))
    if plan is not None:
        entries = [
            LinearEntry(out_features=1, in_features=1, max_rows=1, silu_mul=silu_mul, plan=plan)
            for silu_mul in (False, True)
        ]
        ops.plans = PlanIndex(PlanTable(device="test", linear=tuple(entries), attention=ops.plans.attention))
    if attention is not None:
        ops.plans.attention = attention
    return ops


def test_a_process_with_a_share_of_the_device_does_not_ask_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLASLt leaves parts of results unwritten there."""
    monkeypatch.setenv(SHARE_VARIABLE, "60")
    ops = ops_with(LinearPlan(kind="cublaslt"), None)
    monkeypatch.setattr(launch, "run_library_linear", lambda *_: pytest.fail("the library was asked"))
    weight = ops.pack_linear(draw(torch.Generator().manual_seed(1), 1024, 512, Magnitudes.WIDE).bfloat16())
    for num_rows in (40, 200, 500, 2000):
        x = draw(torch.Generator().manual_seed(num_rows), num_rows, 512, Magnitudes.WIDE).bfloat16().cuda()
        expected = torch.empty((num_rows, 1024), dtype=torch.bfloat16, device="cuda")
        ops.run_linear(x, weight, None, expected, REFERENCE_LINEAR, silu_mul=False)
        assert bits_equal(ops.linear(x, weight), expected)
    assert ops.admission.refusals == []


@pytest.fixture(scope="module")
def reference() -> CudaOps:
    return ops_with(REFERENCE_LINEAR, PLAIN_ATTENTION)


@pytest.mark.parametrize("plan", [None, SWAPPED, COPY_ENGINE])
@pytest.mark.parametrize("kind", ["tiled", "hopper"])
def test_every_probe_equals_the_reference_plans(plan: LinearPlan | None, kind: str, reference: CudaOps) -> None:
    attention = AttentionPlan(prefill_kind="hopper", split_num_warps=2) if kind == "hopper" else None
    ops = ops_with(plan, attention)
    assert differing_probes(ops, reference, ALL_PROBES) == {}
    own = [refusal for refusal in ops.admission.refusals if not refusal.startswith("cublaslt")]
    assert own == [], "another plan served, so the one that was meant was not looked at"


def test_library_products_of_the_table_equal_the_chain() -> None:
    """Each shape and row count where the table lets cuBLASLt serve, fp32 and bf16 results, four kinds of input."""
    ops = CudaOps(torch.device("cuda"))
    cells = defaultdict(list)
    for entry in ops.plans.entries():
        if entry.plan.kind == "cublaslt":
            cells[entry.out_features, entry.in_features].append(entry)
    found = {}
    for (n, k), entries in cells.items():
        generator = torch.Generator().manual_seed(n + k)
        weight = ops.pack_linear(torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * k**-0.5)
        rows = min(max(entry.max_rows for entry in entries), 2048)
        inputs = {"revealing": revealing_inputs(rows, k, seed=2)}
        for magnitudes in (Magnitudes.NORMAL, Magnitudes.DENORMAL, Magnitudes.CANCELLING):
            drawn = draw(generator, 64, k, magnitudes).bfloat16().cuda()
            inputs[magnitudes.value] = drawn.repeat(-(-rows // 64), 1)[:rows]
        for name, x in inputs.items():
            expected = torch.empty((rows, n), device="cuda")
            ops.run_linear(x, weight, None, expected, REFERENCE_LINEAR, silu_mul=False)
            for entry in entries:
                count = min(entry.max_rows, rows)
                for dtype in (torch.float32, torch.bfloat16):
                    out = torch.full((count, n), float("nan"), device="cuda", dtype=dtype)
                    ops.run_linear(x[:count], weight, None, out, entry.plan, silu_mul=False)
                    differing = num_differing(out, expected[:count].to(dtype))
                    if differing:
                        found[n, k, count, name, dtype] = differing
        torch.cuda.empty_cache()
    assert not found


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("name", OPERATIONS)
def test_plans_are_admitted_and_tried_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = name_plans(CudaOps(torch.device("cuda"), residual_dtype=torch.float32))
    first = OPERATIONS[name](ops)
    assert ops.admission.refusals == []
    monkeypatch.setattr(ops.admission, "_refusal", None)  # nothing is left to be tried
    assert bits_equal(OPERATIONS[name](ops), first)
    assert bits_equal(OPERATIONS[name](with_references(ops)), first)


@pytest.mark.parametrize("fault", ["too large", "other bits"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_faulty_plan_is_named_and_another_one_serves(
    name: str, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ops = name_plans(CudaOps(torch.device("cuda"), residual_dtype=torch.float32))
    expected = OPERATIONS[name](with_references(CudaOps(torch.device("cuda"), residual_dtype=torch.float32)))
    if fault == "too large":
        plant(name, TooLarge(), monkeypatch)
    else:
        plant_mistake(name, tmp_path, monkeypatch)
    assert bits_equal(OPERATIONS[name](ops), expected)
    reason = "OutOfResources: out of resource: shared memory" if fault == "too large" else "values differ, first at"
    assert warnings_of(caplog)
    assert all(reason in text for text in warnings_of(caplog))


def test_our_own_plans_of_the_table_are_admitted_on_the_shapes_of_an_8b_model(caplog: pytest.LogCaptureFixture) -> None:
    """A refusal would be a slower step. The library's depend on its version."""
    ops = CudaOps(torch.device("cuda"))
    for n, k, is_swiglu in ((6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False)):
        weight = ops.pack_linear(torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * k**-0.5)
        for num_rows in (1, 16, 64, 256, 1024, 8192):
            x = torch.randn((num_rows, k), device="cuda", dtype=torch.bfloat16)
            if is_swiglu:
                ops.linear_silu_mul(x, weight)
            else:
                ops.linear(x, weight)
    assert [text for text in warnings_of(caplog) if "the plan cublaslt" not in text] == []
