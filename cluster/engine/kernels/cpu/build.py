"""Compiling the native CPU kernels, at installation or at first use.

`setup.py` loads this file by its path in an isolated build, so it imports nothing but the standard
library. The library is plain C to the outside (`csrc/exports.h`) and is opened with ctypes; it carries
the hash of the sources it was made from, so that a stale one is noticed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCE_DIRECTORY = Path(__file__).resolve().parent / "csrc"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",  # a fused multiply-add happens where the source says so, nowhere else
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
COMPILE_TIMEOUT_S = 300.0


class BuildError(Exception):
    """The library could not be built; the message holds the compiler's own words."""


def translation_units() -> list[Path]:
    return sorted(SOURCE_DIRECTORY.glob("*.cpp"))


def headers() -> list[Path]:
    return sorted(SOURCE_DIRECTORY.glob("*.h"))


def source_hash() -> str:
    """Of sources and flags; empty if the sources were not installed along."""
    sources = [*translation_units(), *headers()]
    if not sources:
        return ""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(output: Path) -> None:
    """Build the shared library at `output`, which appears complete or not at all. Raises `BuildError`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler (g++) was found")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in translation_units()]
        define = f'-DTANDEM_SOURCE_HASH="{source_hash()}"'
        _run_all(
            [compiler, *FLAGS, define, "-c", str(unit), "-o", str(target)]
            for unit, target in zip(translation_units(), objects, strict=True)
        )
        linked = Path(scratch) / "linked.so"
        _run_all([[compiler, "-shared", "-pthread", "-o", str(linked), *map(str, objects)]])
        linked.replace(output)


def _run_all(commands: Iterable[list[str]]) -> None:
    """Run the commands side by side; raise the first failure after all have ended."""
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    failure = ""
    for process in running:
        try:
            _, errors = process.communicate(timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        if process.returncode != 0 and not failure:
            failure = errors[-2000:] or f"the compiler ended with status {process.returncode}"
    if failure:
        raise BuildError(failure)
