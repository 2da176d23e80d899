"""Compiles what the launch functions start, for an H100 that is not there: `compiled_for_hopper`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _AbsentHopper:
    """As much of Triton's driver as compiling needs."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiled_for_hopper(directory: Path) -> Iterator[list[Any]]:
    """Inside, starting a kernel compiles it, without running it, and adds it to the list."""
    kernels: list[Any] = []
    started: list[Any] = []

    def compile_only(self: Any, grid: object) -> Any:
        def run(*args: object, **options: object) -> None:
            started.append(self)
            kernels.append(self.run(*args, grid=grid, warmup=True, **options))

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(directory))
        patch.setattr(JITFunction, "__getitem__", compile_only)
        patch.setattr(driver, "_active", _AbsentHopper())
        try:
            yield kernels
        finally:
            for function in started:  # a GPU that is there must not be given what was compiled for another
                function.device_caches.clear()


def spilled_bytes(kernel: Any) -> int:
    """Stack that the assembler needed, of one thread."""
    usage = _inspected(kernel, "cuobjdump", "-res-usage")
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def machine_code(kernel: Any) -> str:
    """Disassembled."""
    return _inspected(kernel, "nvdisasm")


def innermost_loops(kernel: Any) -> list[str]:
    """Machine code between a backward branch and its target with no other loop inside, one instruction to a line."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in machine_code(kernel).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            branch = re.search(r"BRA.*`\((\.L_\w+)\)", instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(lines)))
    innermost = [
        (first, last)
        for first, last in loops
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in loops)
    ]
    return ["\n".join(lines[first:last]) for first, last in innermost]


def _inspected(kernel: Any, tool: str, *options: str) -> str:
    """What a tool of the CUDA toolkit, as Triton brings it, says of the machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def sum_layouts(kernel: Any) -> list[str]:
    """How each fp32 sum's elements are dealt to threads: what decides its order."""
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^#(\w+) = (.*)$", text, re.MULTILINE))
    return [layouts[name] for name in re.findall(r"\}\) : \(tensor<\d+xf32, #(\w+)>\)", text)]
