"""Admission refuses what has other bits, remembers its verdicts, and the fingerprint tells bits apart."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.engine.kernels import fingerprint, get_ops, kernel_report
from cluster.engine.kernels.cpu import library
from cluster.engine.kernels.cpu.arithmetic import InstructionClass, dot_chain, exp
from cluster.engine.kernels.cpu.fp8 import CpuFp8Ops
from cluster.engine.kernels.cpu.reference import ReferenceOps, ReferenceWeight
from cluster.engine.kernels.cpu.select import chosen_class
from cluster.engine.kernels.mutations import MUTANTS, break_kernel
from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.kernels.probe_lists import ATTENTION_PROBES, LINEAR_PROBES, SOFTMAX_PROBES
from cluster.engine.kernels.probes import CacheShape, EqualsReference, Magnitudes, Probe, attention_probe
from cluster.engine.kernels.registry import Candidate, Operation, Registry, describe_difference
from cluster.errors import ConfigError

fingerprints = importlib.import_module(
    "cluster.engine.kernels.fingerprint"
)  # whose name in the package is the function


class SplitK(ReferenceOps):
    """K in two halves, as a parallel GEMV would."""

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        assert isinstance(weight, ReferenceWeight)
        half = weight.in_features // 2
        w = weight.weight_NK
        y_TN = dot_chain(x_TK[:, :half], w[:, :half], self.instructions)
        y_TN = y_TN + dot_chain(x_TK[:, half:], w[:, half:], self.instructions)
        return (y_TN if bias_N is None else y_TN + bias_N.float()).to(out_dtype)


class TileWideMaximum(ReferenceOps):
    """One maximum for all rows of a tile instead of one for each."""

    def _attend_split(
        self, scores_RC: torch.Tensor, values_CD: torch.Tensor, is_visible_RC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        visible = torch.where(is_visible_RC, scores_RC, torch.full_like(scores_RC, -torch.inf))
        best = visible.amax().expand(len(scores_RC), 1)
        weights = exp(visible - best)
        total = torch.zeros_like(best)
        for key in range(weights.shape[1]):
            total = total + weights[:, key : key + 1]
        return best, total, dot_chain(weights.bfloat16(), values_CD.t(), self.instructions) + 0.0


class ReversedFold(ReferenceOps):
    """Splits folded from the last to the first."""

    def _attend_head(
        self,
        q_RD: torch.Tensor,
        keys_CD: torch.Tensor,
        values_CD: torch.Tensor,
        positions_R: torch.Tensor,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        order = torch.cat(list(reversed(torch.split(torch.arange(len(keys_CD)), 256))))
        return super()._attend_head(q_RD, keys_CD[order], values_CD[order], positions_R, scale, window)


# One row that sees every key of whole splits: turning their order is all that `ReversedFold` does.
WHOLE_SPLITS = attention_probe(CacheShape(64, 8, 1, 64, ((2047, 2048),), Magnitudes.CANCELLING))


def _admit(tmp_path: Path, mutant: Ops, probes: tuple[Probe, ...]) -> tuple[Ops, Registry, Operation[Ops]]:
    reference: Ops = ReferenceOps(InstructionClass.AMX_BF16)
    operation = Operation(
        "operation",
        Candidate("reference", reference),
        [Candidate("mutant", mutant)],
        [EqualsReference(probe) for probe in probes],
    )
    registry = Registry(["environment"], tmp_path)
    return registry.admit(operation), registry, operation


@pytest.mark.parametrize(
    ("mutant", "probes"),
    [(SplitK, LINEAR_PROBES), (TileWideMaximum, ATTENTION_PROBES), (ReversedFold, (WHOLE_SPLITS,))],
)
def test_another_order_is_refused_with_a_warning(
    tmp_path: Path, mutant: type[ReferenceOps], probes: tuple[Probe, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen, registry, operation = _admit(tmp_path, mutant(InstructionClass.AMX_BF16), probes)
    assert type(chosen) is ReferenceOps
    assert [record.message.split(" runs")[0] for record in caplog.records] == ["operation"]
    (verdict,) = registry.report([operation])
    assert not verdict.admitted
    assert "values differ" in verdict.detail


def test_the_same_order_is_admitted(tmp_path: Path) -> None:
    ops = ReferenceOps(InstructionClass.AMX_BF16)
    chosen, registry, operation = _admit(tmp_path, ops, LINEAR_PROBES[:3])
    assert chosen is ops
    assert registry.report([operation])[0].detail == "3 cases equal"


class CountingCase:
    name = "counting"

    def __init__(self) -> None:
        self.runs = 0

    def difference(self, candidate: str, reference: str) -> str | None:
        self.runs += 1
        return None if candidate == reference else "other"


def test_verdicts_are_kept_for_the_same_environment_only(tmp_path: Path) -> None:
    case = CountingCase()
    operation = Operation("op", Candidate("r", "same"), [Candidate("a", "other"), Candidate("b", "same")], [case])
    for environment, runs in ((["torch 1"], 2), (["torch 1"], 2), (["torch 2"], 4)):
        registry = Registry(environment, tmp_path)
        assert registry.admit(operation) == "same"
        registry.save()
        assert case.runs == runs
    for path in tmp_path.glob("admission-*.json"):
        path.write_bytes(b"{truncated")
    assert Registry(["torch 1"], tmp_path).admit(operation) == "same"
    assert case.runs == 6


def test_differences_are_counted_in_bits() -> None:
    zeros = torch.tensor([0.0, 1.0, torch.nan])
    assert describe_difference(zeros, torch.tensor([0.0, 1.0, -torch.nan])) is None
    minus = describe_difference(zeros, torch.tensor([-0.0, 1.0, torch.nan]))
    assert minus is not None
    assert minus.startswith("1 of 3 values differ, first at (0,)")
    assert describe_difference(zeros, zeros.double()) is not None
    assert describe_difference(zeros, zeros[:2]) is not None


def filled(value: float, ops: Ops) -> tuple[torch.Tensor, ...]:
    return (torch.full((2,), value),)


def test_probes_of_a_fingerprint_run_at_once_and_count_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to end is the last of the list."""
    met, done = threading.Barrier(3), [threading.Event() for _ in range(4)]
    done[3].set()

    def probe(index: int) -> Probe:
        def run(ops: Ops) -> tuple[torch.Tensor, ...]:
            met.wait(10.0)
            assert done[index + 1].wait(10.0)
            done[index].set()
            return filled(float(index), ops)

        return Probe(f"probe {index}", run)

    ops, shown = get_ops("cpu", 1), list[tuple[int, int]]()
    monkeypatch.setattr(fingerprints, "ALL_PROBES", tuple(probe(index) for index in range(3)))
    at_once = fingerprint(ops, num_threads=3, progress=lambda done, total: shown.append((done, total)))
    assert shown == [(0, 3), (1, 3), (2, 3), (3, 3)]
    plain = [Probe(f"probe {index}", partial(filled, float(index))) for index in range(3)]
    monkeypatch.setattr(fingerprints, "ALL_PROBES", tuple(plain))
    assert fingerprint(ops) == at_once
    monkeypatch.setattr(fingerprints, "ALL_PROBES", tuple(plain[::-1]))
    assert fingerprint(ops) != at_once


def test_a_probe_that_fails_in_a_thread_ends_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ops: Ops) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fingerprints, "ALL_PROBES", tuple(Probe(f"probe {index}", fail) for index in range(9)))
    with pytest.raises(RuntimeError, match="no such instruction"):
        fingerprint(get_ops("cpu", 1), num_threads=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("probe")]


def test_probes_with_other_bits_are_named() -> None:
    """What tests on a GPU compare plans with."""
    pytest.importorskip("triton")
    from tests.gpu.support_admission import differing_probes

    ops = get_ops("cpu", 1)
    probes = (*SOFTMAX_PROBES, LINEAR_PROBES[0])
    assert differing_probes(ops, get_ops("cpu", 2), probes) == {}
    assert list(differing_probes(break_kernel(ops, "linear"), ops, probes)) == [LINEAR_PROBES[0].name]


def test_fingerprint_is_one_for_all_threads_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fingerprint(get_ops("cpu", 1))
    assert fingerprint(get_ops("cpu", 3)) == ours
    code = "from cluster.engine.kernels import *; import sys; sys.stdout.write(fingerprint(get_ops('cpu')))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert other.stdout == ours
    monkeypatch.setenv("TANDEM_CPU_ISA", "fma")
    assert fingerprint(get_ops("cpu", 1)).startswith("cpu:fma/")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_the_fingerprint(name: str) -> None:
    ops = get_ops("cpu", 1)
    with_latent = name in ("latent", "head_linear")
    found = fingerprint(break_kernel(ops, name), with_latent=with_latent)
    assert found != fingerprint(ops, with_latent=with_latent)


def test_a_mutant_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BREAK_KERNEL", "linear")
    assert isinstance(get_ops("cpu"), MUTANTS["linear"])
    monkeypatch.setenv("TANDEM_BREAK_KERNEL", "nothing")
    with pytest.raises(ConfigError, match="linear, attention"):
        get_ops("cpu")


def test_without_library_the_reference_has_the_same_fingerprint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native = fingerprint(get_ops("cpu"))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(library, "_installed", list)
    library.open_library.cache_clear()
    with caplog.at_level(logging.WARNING):
        ops = get_ops("cpu")
    library.open_library.cache_clear()
    assert isinstance(ops, CpuFp8Ops)
    assert isinstance(ops.linear_family, ReferenceOps)
    assert isinstance(ops.attention_family, ReferenceOps)
    assert fingerprint(ops) == native
    assert "no C++ compiler" in caplog.text
    assert "attention runs on its slow reference" in caplog.text


def test_the_report_has_a_verdict_for_every_candidate() -> None:
    verdicts = {(verdict.operation, verdict.candidate): verdict for verdict in kernel_report("cpu")}
    assert ("linear", "onednn") in verdicts
    assert not verdicts["linear", "onednn"].admitted  # it cannot give fp32 results, if nothing else
    operations = {operation for operation, _ in verdicts}
    assert operations >= {"linear", "attention", "rope_and_cache", "rms_norm", "embedding", "softmax"}


def test_the_instruction_class_can_be_chosen() -> None:
    supported = [InstructionClass.AVX512_BF16, InstructionClass.FMA]
    assert chosen_class("", supported) is InstructionClass.AVX512_BF16
    assert chosen_class("fma", supported) is InstructionClass.FMA
    with pytest.raises(ConfigError, match="did you mean 'amx_bf16'"):
        chosen_class("amx", supported)
    with pytest.raises(ConfigError, match="offers avx512_bf16, fma"):
        chosen_class("amx_bf16", supported)


def test_unknown_devices_and_thread_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tpu'"):
        get_ops("tpu")
    with pytest.raises(ConfigError, match="num_threads"):
        get_ops("cpu", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_compute() -> None:
    """The pool's helpers do not exist in a child; it must notice, not wait for them. (torch's own OpenMP
    threads do not survive a fork at all, so torch may have no parallel region here.)"""
    code = """
import os, sys, torch
torch.set_num_threads(1)
from cluster.engine.kernels import get_ops
ops = get_ops("cpu", 2)
x, weight = torch.ones(40, 512).bfloat16(), ops.pack_linear(torch.ones(1024, 512).bfloat16())
first = ops.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.linear(x, weight), first) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
