"""The trials of real kernels in Triton's interpreter, through `CudaOps` on a device that is not there.

fp16 operands and fp32 results, as in `triton_interpret_cases.py`. On a GPU: tests/gpu/test_admission.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.engine.kernels import plan_admission
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton import attention_trials, launch
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, LinearPlan
from tests.gpu.support import bits_equal
from tests.gpu.support_admission import OPERATIONS, TooLarge, name_plans, plant, plant_mistake, with_references


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name: None)
    monkeypatch.setattr(plan_admission, "_MAX_ROUNDS", 1)
    for name, fewer in (("_CONTEXTS", (600, 70)), ("_MANY_ROWS", (65, 33)), ("_FEW_ROWS", (16, 1))):
        monkeypatch.setattr(attention_trials, name, fewer)
    return name_plans(CudaOps(torch.device("cpu"), residual_dtype=torch.float32, pdl=0))


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


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_plan_that_does_not_launch_is_named_and_another_one_serves(
    name: str, ops: CudaOps, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(name, TooLarge(), monkeypatch)
    found = OPERATIONS[name](ops)
    assert any(
        "is not admitted (OutOfResources: out of resource: shared memory" in text for text in warnings_of(caplog)
    )
    assert len(warnings_of(caplog)) == len(ops.admission.refusals)
    assert bits_equal(found, OPERATIONS[name](with_references(ops)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_with_other_bits_is_named_and_another_one_serves(
    name: str, ops: CudaOps, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant_mistake(name, tmp_path, monkeypatch)
    found = OPERATIONS[name](ops)
    assert all(" values differ, first at " in text for text in warnings_of(caplog))
    assert len(warnings_of(caplog)) == len(ops.admission.refusals) > 0
    assert bits_equal(found, OPERATIONS[name](with_references(ops)))


@pytest.mark.parametrize(("num_columns", "is_asked"), [(64, True), (130, False), (33, False)])
def test_the_library_is_asked_only_for_rows_that_start_at_multiples_of_16_bytes(
    num_columns: int, is_asked: bool, ops: CudaOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds in other orders elsewhere: each start would tell of a plan that was not admitted."""
    asked: list[int] = []

    def product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        asked.append(x.shape[1])
        launch.run_linear(x, w, None, out, REFERENCE_LINEAR)

    monkeypatch.setattr(launch, "run_library_linear", product)
    monkeypatch.setattr(ops.plans, "linear", lambda *shape, **how: LinearPlan(kind="cublaslt"))
    weight = ops.pack_linear(torch.randn(48, num_columns).half())
    ops.linear(torch.randn(40, num_columns).half(), weight, out_dtype=torch.float32)
    assert bool(asked) is is_asked
