"""Plans are admitted by comparison: what fails or differs gives way, by name."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from cluster.engine.kernels import plan_admission
from cluster.engine.kernels.plan_admission import PlanAdmission, rows_scope
from cluster.engine.kernels.triton.plans import LinearPlan
from cluster.engine.kernels.triton.trials import LinearTrial

CPU = torch.device("cpu")


class FakePlan(msgspec.Struct, frozen=True, kw_only=True):
    kind: str = "plain"
    stages: int = 1


WANTED, SECOND, REFERENCE = FakePlan(kind="fast", stages=5), FakePlan(kind="chain"), FakePlan()


@dataclass
class FakeTrial:
    """Results are one number per row; `behaviour` changes or fails those of a plan."""

    behaviour: dict[FakePlan, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    num_rows: int = 4
    dtype: torch.dtype = torch.float32
    started: list[FakePlan] = field(default_factory=list)

    subject = "product 4 x 8"
    others = (SECOND, REFERENCE)

    def scope(self, plan: FakePlan) -> Hashable:
        return rows_scope(self.num_rows)

    def draw(self, seed: int, plan: FakePlan) -> torch.Tensor:
        return torch.full((self.num_rows, 4096), seed + 1.0, dtype=self.dtype)

    def expected(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return self.found(inputs, REFERENCE)

    def found(self, inputs: torch.Tensor, plan: FakePlan) -> list[torch.Tensor]:
        self.started.append(plan)
        return [self.behaviour.get(plan, torch.Tensor.clone)(inputs)]

    def number_of(self, plan: FakePlan) -> int:
        return self.started.count(plan)


def served(admission: PlanAdmission, trial: FakeTrial, wanted: FakePlan = WANTED) -> FakePlan:
    return admission.serving((trial.num_rows, wanted), wanted, lambda: trial)


def raising(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    def fail(inputs: torch.Tensor) -> torch.Tensor:
        raise error

    return fail


def one_ulp_off(inputs: torch.Tensor) -> torch.Tensor:
    changed = inputs.clone()
    changed[-1, -1] = torch.nextafter(inputs[-1, -1], torch.tensor(9.0))
    return changed


def filled_with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda inputs: torch.full_like(inputs, value)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_equal_bits_are_admitted_once_and_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    admission, trial = PlanAdmission(CPU), FakeTrial()
    assert [served(admission, trial) for _ in range(3)] == [WANTED] * 3
    assert trial.number_of(WANTED) == 1
    assert SECOND not in trial.started
    assert admission.refusals == []
    assert warnings_of(caplog) == []


def test_the_reference_is_not_compared_with_itself() -> None:
    trial = FakeTrial()
    assert served(PlanAdmission(CPU), trial, REFERENCE) == REFERENCE
    assert trial.started == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CompilationError("x = 1", None, "no such layout"), "CompilationError: .*no such layout"),
        (OutOfResources(300_000, 232_448, "shared memory"), "OutOfResources: out of resource: shared memory"),
        (RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
        (ImportError("No module named 'gluon'"), "ImportError: No module named 'gluon'"),
    ],
)
def test_a_plan_that_does_not_start_gives_way_by_name(
    error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    admission, trial = PlanAdmission(CPU), FakeTrial({WANTED: raising(error)})
    assert served(admission, trial) == SECOND
    [warning] = warnings_of(caplog)
    assert warning.startswith("product 4 x 8: the plan fast stages=5 is not admitted (")
    assert warning.endswith("; chain serves")
    assert re.search(reason, warning)
    assert len(admission.refusals) == 1


def test_other_bits_give_way_and_at_last_the_reference_serves(caplog: pytest.LogCaptureFixture) -> None:
    admission, trial = PlanAdmission(CPU), FakeTrial({WANTED: one_ulp_off, SECOND: raising(RuntimeError("too large"))})
    assert [served(admission, trial) for _ in range(2)] == [REFERENCE] * 2
    first, second = warnings_of(caplog)
    assert "fast stages=5 is not admitted (1 of 16384 values differ, first at (3, 4095)" in first
    assert "chain is not admitted (RuntimeError: too large)" in second
    assert first.endswith("; the reference plain serves") == second.endswith("; the reference plain serves")
    assert trial.number_of(WANTED) == trial.number_of(SECOND) == 1


def test_zeros_of_two_signs_differ_and_payloads_of_nan_do_not() -> None:
    for value, other, expected in ((0.0, -0.0, SECOND), (float("nan"), -float("nan"), WANTED)):
        values = {REFERENCE: value, SECOND: value, WANTED: other}
        trial = FakeTrial({plan: filled_with(value) for plan, value in values.items()})
        assert served(PlanAdmission(CPU), trial) == expected


def test_rows_of_one_scope_share_a_verdict_and_its_warning(caplog: pytest.LogCaptureFixture) -> None:
    admission = PlanAdmission(CPU)
    trials = [FakeTrial({WANTED: one_ulp_off}, num_rows) for num_rows in (5, 8, 9)]
    assert [served(admission, trial) for trial in trials] == [SECOND] * 3
    assert [trial.number_of(WANTED) for trial in trials] == [1, 0, 1]
    assert len(warnings_of(caplog)) == 2


def test_threads_that_want_a_plan_at_once_try_it_once(caplog: pytest.LogCaptureFixture) -> None:
    admission, begun, go_on = PlanAdmission(CPU), threading.Event(), threading.Event()

    def slow(inputs: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go_on.wait(10.0)
        return one_ulp_off(inputs)

    trials = [FakeTrial({WANTED: slow}, num_rows) for num_rows in (5, 8)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(served, admission, trials[0])
        assert begun.wait(10.0)
        second = pool.submit(served, admission, trials[1])
        with pytest.raises(TimeoutError):
            second.result(0.1)  # waits for the verdict
        go_on.set()
        assert [first.result(10.0), second.result(10.0)] == [SECOND, SECOND]
    assert [trial.number_of(WANTED) for trial in trials] == [1, 0]
    assert len(warnings_of(caplog)) == len(admission.refusals) == 1


def test_scopes_end_at_powers_of_two() -> None:
    assert [rows_scope(count) for count in (1, 2, 3, 4, 5, 8, 9, 512, 513)] == [0, 1, 2, 2, 3, 3, 4, 9, 10]
    assert len({rows_scope(count) for count in (1025, 2048, 8192, 100_000)}) == 1


def test_few_rounded_values_are_compared_again_on_other_inputs() -> None:
    """A difference that few inputs show is found: here only the third."""

    def differs_late(inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone() if float(inputs[0, 0]) < 3 else inputs + 1

    trial = FakeTrial({WANTED: differs_late}, num_rows=1, dtype=torch.bfloat16)
    assert served(PlanAdmission(CPU), trial) == SECOND
    equal = FakeTrial(num_rows=1, dtype=torch.bfloat16)
    assert served(PlanAdmission(CPU), equal) == WANTED
    assert equal.number_of(WANTED) == plan_admission._MAX_ROUNDS
    many = FakeTrial(num_rows=64, dtype=torch.bfloat16)
    assert served(PlanAdmission(CPU), many) == WANTED
    assert many.number_of(WANTED) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of memory"), ValueError("ours"), TypeError("ours")])
def test_what_is_no_fault_of_the_plan_goes_up_and_is_no_verdict(error: Exception) -> None:
    admission, trial = PlanAdmission(CPU), FakeTrial({WANTED: raising(error)})
    with pytest.raises(type(error)):
        served(admission, trial)
    trial.behaviour.clear()
    assert served(admission, trial) == WANTED


def test_a_failing_reference_goes_up() -> None:
    with pytest.raises(OutOfResources):
        served(PlanAdmission(CPU), FakeTrial({REFERENCE: raising(OutOfResources(2, 1, "registers"))}))


def test_a_failure_that_took_the_context_with_it_goes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        served(PlanAdmission(torch.device("cuda")), FakeTrial({WANTED: raising(RuntimeError("launch failed"))}))


def test_a_product_that_leaves_a_tile_out_is_refused_though_nobody_compares_it() -> None:
    """Of wide products the first and the last columns are compared; a library left tiles between them unwritten."""

    def product(width: int) -> Callable[[torch.Tensor, torch.Tensor, LinearPlan], None]:
        def run(x_TK: torch.Tensor, out_TN: torch.Tensor, plan: LinearPlan) -> None:
            out_TN[:, : 3000 - width] = 1.0
            out_TN[:, 3000:] = 1.0

        return run

    def found(width: int) -> list[torch.Tensor]:
        weight_NK = torch.zeros((6000, 16), dtype=torch.bfloat16)
        trial = LinearTrial(product(width), weight_NK, None, 3, torch.bfloat16, silu_mul=False)
        return trial.found(trial.draw(0, LinearPlan()), LinearPlan())

    assert [part.shape for part in found(0)] == [(3, 2048), (3, 2048)]
    with pytest.raises(RuntimeError, match="192 of 18000 values were not written"):
        found(64)


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    admission, trial = PlanAdmission(torch.device("cuda")), FakeTrial()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    known = FakeTrial(num_rows=64)
    assert served(admission, known) == WANTED
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert served(admission, known) == WANTED
        assert served(admission, trial) == REFERENCE
    assert trial.started == []
    assert served(admission, trial) == WANTED


def test_long_errors_are_cut_and_causes_are_told() -> None:
    def fail(inputs: torch.Tensor) -> torch.Tensor:
        try:
            raise AttributeError("no attribute 'thread_barrier'")
        except AttributeError as error:
            raise RuntimeError("line\n" * 1000) from error

    admission = PlanAdmission(CPU)
    served(admission, FakeTrial({WANTED: fail}))
    [reason] = admission.refusals
    assert len(reason) < 350
    assert "\n" not in reason
    assert reason.endswith("from AttributeError: no attribute 'thread_barrier'")
