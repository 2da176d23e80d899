"""Launch plans, admitted one by one: a plan serves only after it ran here and gave the reference's bits.

Plans come from tables that were measured elsewhere. On this machine one may not compile (another Triton, a
smaller multiprocessor), and a library picks its algorithm by shape, so equal bits at 1,024 rows say nothing
about 1,023. So the first call that wants a plan tries it beside the reference plan of its operation, on the
model's own weights and inputs that reveal another order of the sum. A plan that fails, or differs in one bit,
gives way to the next one of the operation, at last to the reference, and a warning names it.

A runner uses all shapes of its steps before it serves (`GpuModelRunner.compile_all`), so verdicts are there
by then, and a step only looks them up. While a graph is captured nothing can be compared: what has no
verdict yet is served by the reference then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from triton.errors import TritonError

from cluster.engine.kernels.registry import describe_difference

logger = logging.getLogger(__name__)

Plan = TypeVar("Plan", bound=msgspec.Struct)

MAX_COMPARED_ROWS = 1056  # of our own plans: tiles of all sizes, the last one ragged; nothing changes above
_INTEGERS = {2: torch.int16, 4: torch.int32}
_COMPARED = {2: 1 << 18, 4: 1 << 14}  # values, by their bytes: rounding to bf16 hides nearly all differences
_MAX_ROUNDS = 32
_MAX_REASON = 300  # characters

# What a plan that cannot serve raises: Triton's own errors (compiler, assembler, resources), a kernel's module that
# this Triton does not have, a launch that the driver refuses. Anything else is a mistake of ours and goes up.
_FAILURES = (TritonError, ImportError, RuntimeError)
_NEVER_A_REFUSAL = (torch.OutOfMemoryError, RecursionError, NotImplementedError)


class Trial(Protocol[Plan]):
    """One operation on one shape, as it is about to be served. Rows of results are rows of the step."""

    @property
    def subject(self) -> str:
        """Operation and shape, for a person."""
        ...

    @property
    def others(self) -> Sequence[Plan]:
        """Plans that may serve instead of a refused one, best first; the last one is the reference."""
        ...

    def scope(self, plan: Plan) -> Hashable:
        """What a verdict on `plan` holds for, the plan aside."""
        ...

    def draw(self, seed: int, plan: Plan) -> Any:
        """Inputs to try `plan` on."""
        ...

    def expected(self, inputs: Any) -> list[torch.Tensor]:
        """The reference's result, or the parts of it that are compared."""
        ...

    def found(self, inputs: Any, plan: Plan) -> list[torch.Tensor]:
        """The same parts of the result of `plan`, started exactly as it is served."""
        ...


class PlanAdmission:
    """Verdicts of one process on one device. Threads may ask at once: each plan is tried by one of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._serving: dict[Hashable, Any] = {}
        self._refusals: dict[tuple[Hashable, msgspec.Struct], str | None] = {}
        self._locks: dict[Hashable, threading.RLock] = {}  # one trial of each

    @property
    def refusals(self) -> list[str]:
        """Each refused plan, beginning with its kind, and why; oldest first."""
        return [f"{_described(plan)}: {reason}" for (_, plan), reason in self._refusals.items() if reason is not None]

    def serving(self, call: Hashable, plan: Plan, make_trial: Callable[[], Trial[Plan]]) -> Plan:
        """`plan`, or what serves instead. `call` holds all that `make_trial` and the plan depend on.

        Waits for the device where there is no verdict yet. Raises what the reference raises."""
        found: Plan | None = self._serving.get(call)
        if found is None:
            trial = make_trial()
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return trial.others[-1]
            found = self._serving[call] = self._choose(trial, plan)
        return found

    def _choose(self, trial: Trial[Plan], wanted: Plan) -> Plan:
        refused: dict[Plan, str] = {}
        for plan in (wanted, *trial.others[:-1]):
            if plan == trial.others[-1]:
                break
            key = (trial.scope(plan), plan)
            with self._locks.setdefault(key, threading.RLock()):
                if key not in self._refusals:
                    reason = self._refusals[key] = self._refusal(trial, plan)
                    if reason is not None:
                        refused[plan] = reason
            if self._refusals[key] is None:
                break
        else:
            plan = trial.others[-1]
        instead = ("the reference " if plan == trial.others[-1] else "") + _described(plan)
        for each, reason in refused.items():
            logger.warning(
                "%s: the plan %s is not admitted (%s); %s serves", trial.subject, _described(each), reason, instead
            )
        return plan

    def _refusal(self, trial: Trial[Plan], plan: Plan) -> str | None:
        """None if the plan runs and gives the reference's bits."""
        num_values = 0
        for seed in range(_MAX_ROUNDS):
            inputs = trial.draw(seed, plan)
            expected = trial.expected(inputs)
            try:
                found = trial.found(inputs, plan)
                difference = _first_difference(found, expected)
            except _FAILURES as error:
                if isinstance(error, _NEVER_A_REFUSAL):
                    raise
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # raises if the failure has taken the context with it
                return _reason(error)
            if difference is not None:
                return difference
            num_values += sum(part.numel() for part in found)
            if num_values >= _COMPARED[expected[0].element_size()]:
                break
        return None


def rows_scope(num_rows: int) -> int:
    """Row counts that share a verdict: up to a power of two, and all above 1,024. What our kernels are compiled
    for changes with the rows at powers of two only."""
    return min((num_rows - 1).bit_length(), 11)


def _first_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    for ours, theirs in zip(found, expected, strict=True):
        integer = _INTEGERS[theirs.element_size()]
        if not torch.equal(ours.view(integer), theirs.view(integer)):  # copies nothing, but tells NaN from NaN
            difference = describe_difference(ours, theirs)
            if difference is not None:
                return difference
    return None


def _reason(error: BaseException) -> str:
    """One line; Triton's compiler quotes a whole kernel, and names the cause at the end or in the error before."""
    text = " ".join(str(error).split())
    if error.__cause__ is not None:
        text += f" from {type(error.__cause__).__name__}: " + " ".join(str(error.__cause__).split())
    if len(text) > _MAX_REASON:
        text = f"{text[: _MAX_REASON // 3]} ... {text[-2 * _MAX_REASON // 3 :]}"
    return f"{type(error).__name__}: {text}"


def _described(plan: msgspec.Struct) -> str:
    """The kind, and what differs from the defaults."""
    parts = []
    for field in msgspec.structs.fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, msgspec.Struct):
            parts.append(f"{field.name}=({_described(value)})")
        elif field.name == "kind":
            parts.append(str(value))
        elif value != field.default:
            parts.append(f"{field.name}={value}")
    return " ".join(parts) or "of defaults"
