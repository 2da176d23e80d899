"""Results that a program can read: JSON lines under `benchmarks/results/`, written by runs only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec

RESULTS_DIRECTORY = Path(__file__).parent / "results"
_VERSIONED = ("torch", "triton", "transformers", "nixl", "grpcio", "tandem-serving")

Parameter = bool | int | float | str | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number. `params` are what it depends on and what puts it into perspective."""

    benchmark: str
    metric: str
    value: float
    unit: str
    params: dict[str, Parameter]
    device: str
    versions: dict[str, str]
    commit: str  # with "+" if the tree had uncommitted changes
    date: str


def append_result(
    benchmark: str,
    metric: str,
    value: float,
    unit: str,
    params: dict[str, Parameter],
    *,
    device: str | None = None,
    directory: Path = RESULTS_DIRECTORY,
) -> Path:
    """Append one line to `<date>-<device>-<benchmark>.jsonl` and return that file.

    `device` None: the processor of this machine (or its GPU's name, given by the caller).
    """
    device_name = device or processor_name()
    date = datetime.now(UTC).date().isoformat()
    result = Result(
        benchmark=benchmark,
        metric=metric,
        value=value,
        unit=unit,
        params=params,
        device=device_name,
        versions=_versions(),
        commit=_commit(),
        date=date,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{date}-{_slug(device_name)}-{benchmark}.jsonl"
    with path.open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")
    return path


def read_results(path: Path) -> list[Result]:
    """The lines of one file."""
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines() if line]


def processor_name() -> str:
    """As the operating system names it, e.g. "Intel(R) Xeon(R) Platinum 8480C"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS_DIRECTORY.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()

    if given := os.environ.get("BENCHMARK_COMMIT"):  # measured on a machine that has the files but not the history
        return given
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
