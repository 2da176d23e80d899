"""Checks of the machine itself: Python, packages, CPU, memory, devices, ports, the model cache."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from cluster.doctor import gpu
from cluster.doctor.finding import Finding, broken, limited, ok
from cluster.errors import ModelError, StartupError
from cluster.launch.cores import usable_cores
from cluster.launch.ports import check_port_free
from cluster.model_files.cache import cache_directory
from cluster.model_files.demo import DEMO_BYTES, DEMO_FILE

GIB = 1 << 30
SUPPORTED_PYTHON = ((3, 11), (3, 13))
NEEDED_MEMORY = 2 * GIB  # two workers with the demo model
NEEDED_DISK = GIB
BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def python() -> Finding:
    version = platform.python_version()
    low, high = SUPPORTED_PYTHON
    if low <= sys.version_info[:2] < high:
        return ok("Python", f"{version} at {sys.executable}")
    return broken("Python", f"{version}, which is not supported", "use Python 3.11 or 3.12: make PYTHON=python3.12")


def packages() -> Finding:
    """The installed versions against what this version of ours declares."""
    try:
        ours = metadata.distribution("tandem-serving")
    except metadata.PackageNotFoundError:
        return broken("Packages", "tandem-serving is not installed", "run `make install`, or `pip install -e .`")
    wrong: list[str] = []
    needed = [Requirement(text) for text in ours.requires or []]
    needed = [requirement for requirement in needed if requirement.marker is None]
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return broken("Packages", ", ".join(wrong), "run `pip install -c requirements.lock -e .`")
    return ok("Packages", f"torch {metadata.version('torch')}, nixl {metadata.version('nixl')}, all {len(needed)} fit")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    fields = _first_processor(cpuinfo)
    flags = set(fields.get("flags", "").split())
    detail = f"{fields.get('model name', platform.machine())}, {usable_cores()} usable cores"
    for flag in BF16_FLAGS:
        if flag in flags:
            return ok("Processor", f"{detail}, {flag}")
    lacking = "no bf16 instructions"
    return limited("Processor", f"{detail}, {lacking}", "nothing to repair: this machine is right, but slow")


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    try:
        text = cpuinfo.read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    detail = f"{available / GIB:.1f} GiB available"
    if available >= NEEDED_MEMORY:
        return ok("Memory", detail)
    fix = "free some, use `--monolithic`, or set a smaller `decode.engine.kv_cache_bytes`"
    return limited("Memory", f"{detail}, the demo with two workers takes about {NEEDED_MEMORY / GIB:.0f} GiB", fix)


def devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        yield broken(
            "Devices", f"torch cannot be imported: {error}", "reinstall it: pip install -c requirements.lock torch"
        )
        return
    yield ok("Devices", f"cpu, {torch.get_num_threads()} threads")
    yield from gpu.examined()


def router_port(port: int, host: str = "127.0.0.1") -> Finding:
    try:
        check_port_free(host, port, "router.port")
    except StartupError as error:
        fix = "choose another with `--port`, or a free one with `--port 0`"
        return limited("Port", error.message, fix)
    return ok("Port", f"{host}:{port} is free for the router")


def model_cache() -> Finding:
    fix = "name a directory you can write to: export TANDEM_CACHE=/some/where"
    try:
        directory = cache_directory()
    except ModelError as error:
        return broken("Model cache", error.message, fix)
    if not os.access(directory, os.W_OK | os.X_OK):
        return broken("Model cache", f"{directory} cannot be written", fix)
    demo = directory / DEMO_FILE
    has_demo = demo.exists() and demo.stat().st_size == DEMO_BYTES
    free = shutil.disk_usage(directory).free
    detail = f"{directory}, {free / GIB:.1f} GiB free, demo model {'present' if has_demo else 'not fetched yet'}"
    if free < NEEDED_DISK and not has_demo:
        return limited("Model cache", detail, f"free some space, or {fix}")
    return ok("Model cache", detail)
