"""Which kernel serves which operation: bits first, then speed.

For each operation there is a reference (slow, obviously in the canonical order) and candidates, best
first. A candidate is admitted only if it equals the reference, bit for bit, on every case; none is
admitted by argument. If none is admissible, the reference serves, and a warning names the operation.

Device-neutral: what a candidate is, and what a case does with it, is the device's business.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import torch

from cluster.model_files.cache import cache_location

logger = logging.getLogger(__name__)

Implementation = TypeVar("Implementation")
Contravariant = TypeVar("Contravariant", contravariant=True)


class Case(Protocol[Contravariant]):
    """One comparison. Inputs are seeded, so that every process sees the same."""

    @property
    def name(self) -> str: ...

    def difference(self, candidate: Contravariant, reference: Contravariant) -> str | None:
        """None if the bits are equal, else what differs, for a person to read."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Implementation]):
    name: str
    implementation: Implementation


@dataclass(frozen=True, slots=True)
class Operation(Generic[Implementation]):
    """An operation (or a family that shares packed data) for one shape class on one device."""

    name: str
    reference: Candidate[Implementation]
    candidates: Sequence[Candidate[Implementation]]  # best first
    cases: Sequence[Case[Implementation]]


class Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The verdict on one candidate."""

    operation: str
    candidate: str
    admitted: bool
    detail: str  # the first difference, or how many cases were equal


class _Verdicts(msgspec.Struct, forbid_unknown_fields=True):
    admissions: list[Admission]


class Registry:
    """Verdicts for one environment: whatever can change a kernel's bits is in `environment`.

    Verdicts are kept on disk; `save` after the last `admit`. A cache that cannot be read or written
    only costs time.
    """

    def __init__(self, environment: Sequence[str], directory: Path | None = None) -> None:
        key = hashlib.sha256("\0".join(environment).encode()).hexdigest()[:24]
        self._path = (directory or cache_location()) / f"admission-{key}.json"
        self._verdicts = {(a.operation, a.candidate): a for a in self._load()}
        self._is_changed = False

    def admit(self, operation: Operation[Implementation]) -> Implementation:
        """The best admissible implementation. Candidates after it are not examined."""
        refused = []
        for candidate in operation.candidates:
            verdict = self.examine(operation, candidate)
            if verdict.admitted:
                return candidate.implementation
            refused.append(f"{candidate.name} ({verdict.detail})")
        logger.warning(
            "%s runs on its slow reference: no kernel is admitted here. %s",
            operation.name,
            "; ".join(refused) or "There is none for this machine.",
        )
        return operation.reference.implementation

    def report(self, operations: Sequence[Operation[Implementation]]) -> list[Admission]:
        """The verdict on every candidate, also on those that are not needed."""
        return [self.examine(operation, candidate) for operation in operations for candidate in operation.candidates]

    def examine(self, operation: Operation[Implementation], candidate: Candidate[Implementation]) -> Admission:
        key = (operation.name, candidate.name)
        if key not in self._verdicts:
            with one_torch_thread():
                self._verdicts[key] = _compare(operation, candidate)
            self._is_changed = True
        return self._verdicts[key]

    def save(self) -> None:
        if not self._is_changed:
            return
        data = msgspec.json.encode(_Verdicts(list(self._verdicts.values())))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(data)
            Path(file.name).replace(self._path)
        except OSError as error:
            logger.info("Admission verdicts cannot be kept in %s: %s", self._path, error)

    def _load(self) -> list[Admission]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Verdicts).admissions
        except (OSError, msgspec.DecodeError):
            return []


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small tensors are faster so, by a factor of ten where processes share cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(operation: Operation[Implementation], candidate: Candidate[Implementation]) -> Admission:
    for case in operation.cases:
        difference = case.difference(candidate.implementation, operation.reference.implementation)
        if difference is not None:
            return Admission(operation.name, candidate.name, False, f"{case.name}: {difference}")
    return Admission(operation.name, candidate.name, True, f"{len(operation.cases)} cases equal")


_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, every NaN as the same one (its payload is nobody's promise)."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(_INTEGER_OF[tensor.element_size()])


def describe_difference(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """None if the bits are equal, else how many differ and where the first one is."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype}{tuple(ours.shape)} instead of {theirs.dtype}{tuple(theirs.shape)}"
    is_different = bits(ours) != bits(theirs)
    if not bool(is_different.any()):
        return None
    where = tuple(is_different.nonzero()[0].tolist())
    return (
        f"{int(is_different.sum())} of {is_different.numel()} values differ, "
        f"first at {where}: {ours[where].item()!r} instead of {theirs[where].item()!r}"
    )
