"""The user's cache directory, locks in it, and digests of large files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cluster.errors import ModelError

Progress = Callable[[int, int], None]  # (bytes done, bytes in total); total is an estimate for downloads

_CHUNK_BYTES = 4 << 20
_MOST_HASHED_AT_ONCE = 8  # files
_LOCK_POLL_S = 0.1


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """The progress callback of callers that show none."""


def cache_location() -> Path:
    """`$TANDEM_CACHE`, else `$XDG_CACHE_HOME/tandem`, else `~/.cache/tandem`; it may not exist."""
    if named := os.environ.get("TANDEM_CACHE"):
        return Path(named).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "tandem"
    return Path.home() / ".cache" / "tandem"


def cache_directory() -> Path:
    """`cache_location()`, created if missing."""
    directory = cache_location()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot create the cache directory {directory}: {error}; set TANDEM_CACHE") from error
    return directory


@contextmanager
def file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it if the holder dies.

    Raises `ModelError` if another process still holds it after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelError(f"{path} was held by another process for {timeout_s:.0f} s") from None
                time.sleep(_LOCK_POLL_S)
        yield


class _DigestEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A digest and the state of the file it was taken of."""

    path: str
    num_bytes: int
    mtime_ns: int
    inode: int
    sha256: str


def file_sha256(path: Path, progress: Progress = no_progress) -> str:
    """SHA-256 of a file's content, in hex; remembered in the cache while size, mtime and inode stay.

    Raises `ModelError` if the file cannot be read. A cache that cannot be written costs time only.
    """
    real, state = path.resolve(), _state(path)
    entry_path = cache_directory() / "digests" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    known = _read_entry(entry_path)
    key = (str(real), state.st_size, state.st_mtime_ns, state.st_ino)
    if known is not None and (known.path, known.num_bytes, known.mtime_ns, known.inode) == key:
        return known.sha256
    sha256 = _hash(real, state.st_size, progress)
    _write_entry(entry_path, _DigestEntry(*key, sha256))
    return sha256


def files_sha256(paths: Sequence[Path], progress: Progress = no_progress) -> list[str]:
    """`file_sha256` of each, several at a time: hashing leaves the interpreter, and large models lie in many files.

    `progress` is called by one thread at a time, with bytes of all files; one that is not read again counts as read.
    """
    sizes = {path: _state(path).st_size for path in paths}
    done_bytes = dict.fromkeys(paths, 0)
    lock = threading.Lock()

    def hashed(path: Path) -> str:
        def note(done: int, _: int) -> None:
            with lock:
                done_bytes[path] = done
                progress(sum(done_bytes.values()), sum(sizes.values()))

        found = file_sha256(path, note)
        done_bytes[path] = sizes[path]
        return found

    if not paths:
        return []
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1, _MOST_HASHED_AT_ONCE)) as pool:
        return list(pool.map(hashed, paths))


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _hash(path: Path, num_bytes: int, progress: Progress) -> str:
    digest = hashlib.sha256()
    done_bytes = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done_bytes += len(chunk)
                progress(done_bytes, num_bytes)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _read_entry(path: Path) -> _DigestEntry | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_DigestEntry)
    except (OSError, msgspec.DecodeError):
        return None


def _write_entry(path: Path, entry: _DigestEntry) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(msgspec.json.encode(entry))
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
