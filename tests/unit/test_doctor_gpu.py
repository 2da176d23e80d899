"""The doctor on a machine with GPUs: what is told of each, without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.doctor import gpu
from cluster.doctor.finding import Finding, Status
from cluster.doctor.gpu import GIB, Gpu, judge

IDLE = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, has_plans=True)


def test_an_idle_gpu_with_plans_is_as_it_should_be() -> None:
    assert judge(IDLE) == Finding(name="cuda:0", status=Status.OK, detail="NVIDIA H200, sm_90, 139.0 of 140.0 GiB free")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (IDLE._replace(number=1, capability=(7, 5)), ("cuda:1", "sm_75", "does not multiply bf16", "another GPU")),
        (IDLE._replace(free=90 * GIB), ("90.0 of 140.0 GiB", "other processes", "gpu_memory_fraction")),
        (IDLE._replace(has_plans=False), ("no plans were measured on it", "tune_rows")),
        (IDLE._replace(capability=(8, 0), has_plans=False), ("sm_80", "on sm_90 only", "tune_rows")),
    ],
)
def test_what_limits_a_gpu_is_named_with_the_way_out(found: Gpu, words: tuple[str, ...]) -> None:
    finding = judge(found)
    assert finding.status is Status.LIMITED
    text = f"{finding.name} {finding.detail} {finding.fix}"
    assert all(word in text for word in words), text


def pretend(monkeypatch: pytest.MonkeyPatch, *free: int | RuntimeError) -> None:
    """That many H200s; an error is what asking for its memory raises."""

    def memory(index: int) -> tuple[int, int]:
        found = free[index]
        if isinstance(found, RuntimeError):
            raise found
        return found, 140 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_each_gpu_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    pretend(monkeypatch, 139 * GIB, RuntimeError("CUDA error: busy\nsee the manual"), 100 * GIB)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mine")
    findings = {finding.name: finding for finding in gpu.examined()}
    assert list(findings) == ["GPU kernels", "cuda:0", "cuda:1", "cuda:2", "MPS"]
    assert findings["cuda:0"].status is Status.OK
    assert findings["cuda:1"].status is Status.LIMITED
    assert findings["cuda:1"].detail == "it cannot be used: CUDA error: busy"
    assert "other processes" in findings["cuda:2"].detail
    assert findings["GPU kernels"].detail == "Triton, launchers by cc"
    assert "a daemon runs" in findings["MPS"].detail


def test_plans_are_those_that_are_committed() -> None:
    pytest.importorskip("triton")
    assert gpu.has_plans("NVIDIA H200")
    assert gpu.has_plans("NVIDIA H100 80GB HBM3")
    assert not gpu.has_plans("NVIDIA A100-SXM4-80GB")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    finding = gpu.compilers()
    assert finding.status is Status.LIMITED
    assert "no C compiler" in finding.detail


def test_gpus_that_torch_does_not_reach_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list(gpu.examined(tmp_path)) == []
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = gpu.examined(tmp_path)
    assert finding.status is Status.LIMITED
    assert "2 NVIDIA devices" in finding.detail
    assert "without CUDA" in finding.detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (finding,) = gpu.examined(tmp_path)
    assert "CUDA 13.0" in finding.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(gpu.examined(tmp_path)) == [], "hidden on purpose"
