"""Choosing the CPU operations of a process: instruction class, admission, threads."""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

import torch

from cluster.engine.kernels.composed import ComposedOps
from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.fp8 import CpuFp8Ops
from cluster.engine.kernels.cpu.library import (
    VARIANTS,
    Functions,
    cpu_flags,
    cpu_model,
    open_library,
    supported_classes,
    supports,
)
from cluster.engine.kernels.cpu.native import NativeOps
from cluster.engine.kernels.cpu.onednn import OneDnnOps
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probe_lists import (
    ATTENTION_PROBES,
    EMBEDDING_PROBES,
    LATENT_PROBES,
    LINEAR_PROBES,
    MOE_PROBES,
    NORM_PROBES,
    ROPE_PROBES,
    SOFTMAX_PROBES,
)
from cluster.engine.kernels.probes import EqualsReference, Probe, linear_rows_case
from cluster.engine.kernels.probes_moe import expert_rows_case
from cluster.engine.kernels.registry import Admission, Candidate, Case, Operation, Registry
from cluster.errors import ConfigError

ISA_VARIABLE = "TANDEM_CPU_ISA"


def make_cpu_ops(num_threads: int | None = None) -> Ops:
    """The admitted operations of this machine's instruction class; admission is remembered on disk."""
    selection = _Selection(num_threads)
    chosen = {operation.name: selection.registry.admit(operation) for operation in selection.operations}
    selection.registry.save()
    return CpuFp8Ops(_composed(chosen))


def _composed(chosen: dict[str, Ops]) -> Ops:
    """One implementation out of those chosen for each family."""
    first = chosen["linear"]
    if all(ops is first for ops in chosen.values()):
        return first
    return ComposedOps(
        name=first.name,
        device=first.device,
        residual_dtype=first.residual_dtype,
        linear_family=first,
        attention_family=chosen["attention"],
        rope_family=chosen["rope_and_cache"],
        norm_family=chosen["rms_norm"],
        embedding_family=chosen["embedding"],
        softmax_family=chosen["softmax"],
        moe_family=chosen["moe"],
        latent_family=chosen["latent"],
    )


def report_cpu() -> list[Admission]:
    """The verdict on every candidate of this machine, for people to read."""
    selection = _Selection(None)
    admissions = selection.registry.report(selection.operations)
    selection.registry.save()
    return admissions


class _Selection:
    """What there is to choose from, in this process."""

    def __init__(self, num_threads: int | None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {num_threads}")
        library = open_library()
        supported = supported_classes(library)
        instructions = chosen_class(os.environ.get(ISA_VARIABLE, ""), supported)
        self.registry = Registry(_environment(instructions))
        threads = num_threads or len(os.sched_getaffinity(0))
        reference: Candidate[Ops] = Candidate("reference", ReferenceOps(instructions))
        native: list[Candidate[Ops]] = []
        if library is not None:
            native = [
                Candidate(f"native:{variant}", NativeOps(Functions(library, variant), instructions, threads))
                for variant in VARIANTS[instructions]
                if supports(library, variant)
            ]
        onednn: Candidate[Ops] = Candidate("onednn", OneDnnOps(instructions))
        rows_case = linear_rows_case(256, 384, 1536)
        linear_cases: list[Case[Ops]] = [rows_case, *_equal_reference(LINEAR_PROBES)]
        # oneDNN is here to be judged, not to serve without the fp32 results that it cannot give.
        self.operations: list[Operation[Ops]] = [
            Operation("linear", reference, [*native, onednn], linear_cases),
            Operation("attention", reference, native, _equal_reference(ATTENTION_PROBES)),
            Operation("rope_and_cache", reference, native, _equal_reference(ROPE_PROBES)),
            Operation("rms_norm", reference, native, _equal_reference(NORM_PROBES)),
            Operation("embedding", reference, native, _equal_reference(EMBEDDING_PROBES)),
            Operation("softmax", reference, native, _equal_reference(SOFTMAX_PROBES)),
            Operation("moe", reference, native, [expert_rows_case(96, 5, 128, 320), *_equal_reference(MOE_PROBES)]),
            Operation("latent", reference, native, _equal_reference(LATENT_PROBES)),
        ]


def _equal_reference(probes: tuple[Probe, ...]) -> list[Case[Ops]]:
    return [EqualsReference(probe) for probe in probes]


def chosen_class(wanted: str, supported: list[InstructionClass]) -> InstructionClass:
    """The class named `wanted`, or the best supported one if it is empty. Raises `ConfigError`."""
    if not wanted:
        return supported[0]
    names = [instructions.value for instructions in InstructionClass]
    if wanted not in names:
        closest = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{ISA_VARIABLE}={wanted!r} is unknown, did you mean {closest!r}? Known: {', '.join(names)}")
    instructions = InstructionClass(wanted)
    if instructions not in supported:
        available = ", ".join(c.value for c in supported)
        raise ConfigError(f"{ISA_VARIABLE}={wanted}: this processor offers {available}")
    return instructions


def _environment(instructions: InstructionClass) -> list[str]:
    """Everything that can change a kernel's bits or a verdict."""
    kernels = Path(__file__).parents[1]
    sources = [*kernels.glob("*.py"), *kernels.glob("cpu/*.py"), *kernels.glob("cpu/csrc/*")]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return [cpu_model(), " ".join(sorted(cpu_flags())), torch.__version__, instructions.value, digest.hexdigest()]
