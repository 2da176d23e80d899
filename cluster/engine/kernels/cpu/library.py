"""Finding and opening the native library, and what the processor supports."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.machinery
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.engine.kernels.cpu import build
from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.model_files.cache import cache_location

logger = logging.getLogger(__name__)

_INTEGER, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_LETTERS = {"i": _INTEGER, "p": _POINTER, "f": _FLOAT}
_SIGNATURES = {  # one letter per parameter of csrc/exports.h
    "pack": "piiipi",
    "linear": "piipipipiii",
    "silu_mul": "piipi",
    "embedding": "ppiipi",
    "rms_norm": "pipifiipii",
    "add_rms_norm": "ppipifiipi",
    "rope_and_cache": "ppiiiipppppifiiiiipi",
    "attention": "ppiiiipppiiiiiiifpi",
    "log_softmax_stats": "piiippi",
    "softmax": "piiipi",
    "argmax": "piiipi",
    "combine": "ppiiipi",
}

# The variants of a class that give the same bits, best first.
VARIANTS = {
    InstructionClass.AMX_BF16: ("amx_bf16",),
    InstructionClass.AVX512_BF16: ("avx512_bf16",),
    InstructionClass.FMA: ("fma_avx512", "fma_avx2", "fma_portable"),
}
_CPUINFO_FLAGS = {
    InstructionClass.AMX_BF16: {"amx_tile", "amx_bf16", "avx512f"},
    InstructionClass.AVX512_BF16: {"avx512_bf16", "avx512f"},
    InstructionClass.FMA: set[str](),
}


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The native library for exactly these sources: the installed one, else one built into the cache.

    None, with a warning that says why, if neither is possible. Tried once in a process.
    """
    wanted = build.source_hash()
    for path in _installed():
        library = _open(path)
        if library is not None and wanted in ("", _hash_of(library)):
            return library
    if not wanted:
        logger.warning("The native CPU kernels are not installed, neither built nor as sources.")
        return None
    cached = cache_location() / f"cpu-kernels-{wanted}.so"
    try:
        with _one_builder(cached.with_suffix(".lock")):
            if not cached.exists():
                logger.info("Building the native CPU kernels (once, about 20 s) into %s", cached)
                build.compile_library(cached)
    except (build.BuildError, OSError) as error:
        logger.warning("The native CPU kernels could not be built: %s", error)
        return None
    return _open(cached)


@contextmanager
def _one_builder(lock_path: Path) -> Iterator[None]:
    """Processes that start together build one after the other: the first does it for all. A wait that
    takes too long only means that the work is done twice."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + build.COMPILE_TIMEOUT_S
    with lock_path.open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _installed() -> list[Path]:
    directory = Path(__file__).parent
    candidates = (directory / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in candidates if path.exists()]


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s cannot be opened: %s", path, error)
        return None
    library.tandem_source_hash.restype = ctypes.c_char_p
    return library


def _hash_of(library: ctypes.CDLL) -> str:
    return bytes(library.tandem_source_hash()).decode()


class Functions:
    """The typed functions of one variant: `functions.linear(...)` and so on. They release the GIL."""

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        assert supports(library, variant), f"this processor cannot run {variant}"  # also asks the kernel for AMX
        for name, letters in _SIGNATURES.items():
            function = getattr(library, f"tandem_{variant}_{name}")
            function.argtypes = [_LETTERS[letter] for letter in letters]
            function.restype = None
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:  # only to tell the type checker
        raise AttributeError(name)


def supports(library: ctypes.CDLL, variant: str) -> bool:
    return bool(library.tandem_supports(variant.encode()))


def supported_classes(library: ctypes.CDLL | None) -> list[InstructionClass]:
    """Best first. Without the library: by the flags the kernel reports."""
    best_first = list(reversed(InstructionClass))
    if library is not None:
        return [c for c in best_first if any(supports(library, variant) for variant in VARIANTS[c])]
    flags = cpu_flags()
    return [c for c in best_first if _CPUINFO_FLAGS[c] <= flags]


def cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def cpu_model() -> str:
    return _cpuinfo("model name") or "unknown processor"


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
