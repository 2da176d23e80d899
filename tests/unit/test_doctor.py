"""The doctor's judgements: what counts as broken, and that each such line says how to repair it."""

from __future__ import annotations

import io
import json
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from cluster import doctor
from cluster.doctor import hand_over, kernels, machine
from cluster.doctor.finding import Finding, Status, broken, limited, ok
from cluster.engine.kernels import Admission


def report(findings: list[Finding], as_json: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    monkeypatch.setattr(doctor, "examine", lambda router_port: iter(findings))
    out = io.StringIO()
    healthy = doctor.run_doctor(Console(file=out, width=100), as_json, 8000)
    return healthy, out.getvalue()


def test_only_what_is_broken_makes_the_machine_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report([ok("a", "x"), limited("b", "slow", "get another")], True, monkeypatch)[0]
    healthy, text = report([ok("a", "x"), broken("b", "gone", "put it back")], False, monkeypatch)
    assert not healthy
    assert "→ put it back" in text


def test_json_is_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = report([broken("b", "gone", "put it back")], True, monkeypatch)
    expected = {"name": "b", "status": "broken", "detail": "gone", "fix": "put it back"}
    assert json.loads(text) == {"healthy": False, "findings": [expected]}


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("fma avx2 amx_bf16", Status.OK),
        ("fma avx512_bf16", Status.OK),
        ("fma avx2", Status.LIMITED),
        ("", Status.LIMITED),
    ],
)
def test_the_processor_is_judged_by_its_instructions(tmp_path: Path, flags: str, status: Status) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        f"processor\t: 0\nmodel name\t: A Fine One\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: amx_bf16\n"
    )
    finding = machine.processor(cpuinfo)
    assert finding.status is status
    assert "A Fine One" in finding.detail
    assert machine.processor(tmp_path / "missing").status is Status.LIMITED


def test_little_memory_is_a_limit_with_a_way_out(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    500000 kB\n")
    finding = machine.memory(meminfo)
    assert finding.status is Status.LIMITED
    assert "--monolithic" in finding.fix


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        finding = machine.router_port(server.getsockname()[1])
    assert finding.status is Status.LIMITED
    assert "--port" in finding.fix


def test_an_unwritable_cache_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "file" / "cache"))
    finding = machine.model_cache()
    assert finding.status is Status.BROKEN
    assert "TANDEM_CACHE" in finding.fix


def test_a_cache_without_the_demo_model_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "new"))
    finding = machine.model_cache()
    assert finding.status is Status.OK
    assert "not fetched yet" in finding.detail


def test_a_missing_or_wrong_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "msgspec" else installed(name)

    monkeypatch.setattr(metadata, "version", version)
    finding = machine.packages()
    assert finding.status is Status.BROKEN
    assert "gguf is missing" in finding.detail
    assert "msgspec 0.0.1 is not >=" in finding.detail


def test_a_transfer_that_hangs_or_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    def crashes(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, -11, stdout=b"noise\n", stderr=b"a\nSegmentation fault\n")

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "did not end within" in hand_over.transfer_check().detail
    monkeypatch.setattr(subprocess, "run", crashes)
    finding = hand_over.transfer_check()
    assert finding.status is Status.BROKEN
    assert "Segmentation fault" in finding.detail


def test_an_operation_on_its_slow_reference_is_a_limit() -> None:
    fast, refused = Admission("linear", "native", True, "equal"), Admission("linear", "onednn", False, "7 differ")
    assert kernels.judge([fast, refused]).detail == "linear native"
    finding = kernels.judge([fast, Admission("attention", "native", False, "1 differs")])
    assert finding.status is Status.LIMITED
    assert "attention" in finding.detail
    assert kernels.judge([]).status is Status.LIMITED


def test_an_unusable_instruction_class_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CPU_ISA", "abacus")
    (finding,) = kernels.admitted()
    assert finding.status is Status.BROKEN
    assert "TANDEM_CPU_ISA" in finding.detail


def test_a_slow_transport_is_reported() -> None:
    assert hand_over.judge_speed(0.01).status is Status.LIMITED
    assert hand_over.judge_speed(2.0).status is Status.OK


def test_nixl_moves_bytes_between_processes_here() -> None:
    finding = hand_over.transfer_check()
    assert finding.status is not Status.BROKEN, finding.detail
    assert "compared" in finding.detail
