"""The private directory of one launch: config files of its processes and the cluster key. Gone at the end.

A launch holds a lock on a file in it. A process id alone does not say whether one runs: after it was killed, or in
another container, its number belongs to somebody else.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cluster.errors import ConfigError, StartupError

KEY_BYTES = 32
_PREFIX = "tandem-launch-"
_LOCK = "lock"
_BEGINNING_S = 5.0
_OWNER = re.compile(rf"{_PREFIX}(\d+)-\w+")


@contextmanager
def run_directory() -> Iterator[Path]:
    """Mode 0700, named after this process; what launchers that were killed left behind is removed first."""
    parent = _parent()
    try:
        _remove_abandoned(parent)
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StartupError(f"cannot create a private directory in {parent}: {error.strerror}; set TMPDIR") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, however it does; no child inherits it
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def launches() -> list[tuple[int, Path]]:
    """Process id and directory of every launch of this user that is running."""
    return [(owner, entry) for owner, entry in _ours(_parent()) if _is_held(entry)]


def _parent() -> Path:
    """A job on another host may have inherited the name of a runtime directory that is not there."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    return runtime if runtime.is_absolute() and runtime.is_dir() else Path(tempfile.gettempdir())


def _remove_abandoned(parent: Path) -> None:
    for _, entry in _ours(parent):
        if not _is_held(entry) and not _is_beginning(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _ours(parent: Path) -> Iterator[tuple[int, Path]]:
    for entry in parent.glob(f"{_PREFIX}*"):
        owner = _OWNER.fullmatch(entry.name)
        if owner is not None and _is_of_this_user(entry):
            yield int(owner[1]), entry


def _is_of_this_user(entry: Path) -> bool:
    try:
        return not entry.is_symlink() and entry.stat().st_uid == os.getuid()
    except FileNotFoundError:  # another one cleans up, too: the ranks of a job that begins again do it together
        return False


def _is_held(directory: Path) -> bool:
    """Whether the launch that made it still runs."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _is_beginning(directory: Path) -> bool:
    """A launch that begins has a directory a moment before it has the lock."""
    try:
        return time.time() - directory.stat().st_mtime < _BEGINNING_S
    except OSError:
        return True  # gone


def write_private(path: Path, content: bytes) -> Path:
    """Create a new file that only this user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    return path


def replace_private(path: Path, content: bytes) -> Path:
    """As `write_private`, in place of what is there; a reader sees the old content or the new one."""
    return write_private(path.with_name(f"{path.name}.new"), content).replace(path)


def write_config(directory: Path, name: str, config: msgspec.Struct) -> Path:
    return write_private(directory / f"{name}.json", msgspec.json.format(msgspec.json.encode(config)))


def cluster_key_file(directory: Path, given: str | None) -> Path:
    """The user's key file after a check of its mode and size, else a new key in `directory`.

    The key itself goes through files only: never on a command line, in the environment or in a log.
    """
    if given is None:
        return write_private(directory / "cluster.key", secrets.token_hex(KEY_BYTES).encode())
    path = Path(given).expanduser().absolute()
    try:
        status = path.stat()
        length = len(path.read_bytes().strip())
    except OSError as error:
        raise ConfigError(f"security.cluster_key_file: cannot read {path}: {error.strerror}") from error
    # A mounted secret belongs to root, and a process of another user reads it as a member of its group.
    permitted = 0 if status.st_uid == os.getuid() else stat.S_IRGRP
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~permitted:
        raise ConfigError(f"security.cluster_key_file: others can read {path}; run `chmod 600 {path}`")
    if length < KEY_BYTES:
        raise ConfigError(
            f"security.cluster_key_file: {path} holds {length} bytes, at least {KEY_BYTES} are needed; "
            f"make one with `openssl rand -hex {KEY_BYTES} > {path}`"
        )
    return path
