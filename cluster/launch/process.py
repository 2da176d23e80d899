"""One launched process: its start, its events, its last words and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import StartupError
from cluster.process_events import Failed, ProcessEvent, Ready, parse

MAX_LAST_LINES = 30
MAX_LINE_BYTES = 16 * 1024
PIPE_GRACE_S = 2.0  # for output that is still in the pipes when the process has ended


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run: `python -m <command>`. `stop_order`: lower ones are drained first."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_order: int = 0


class ProcessListener(Protocol):
    """Told what a process says, on the event loop."""

    def on_event(self, name: str, event: ProcessEvent) -> None: ...

    def on_log(self, name: str, line: str) -> None: ...


class ManagedProcess:
    """Made by `start`. The caller awaits `wait`, which also reaps whatever is left of its group."""

    def __init__(self, spec: ProcessSpec, child: asyncio.subprocess.Process, listener: ProcessListener) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        self.exited = asyncio.Event()
        self.failure: Failed | None = None
        self.was_too_slow = False
        self._child = child
        self._listener = listener
        self._last_lines: deque[str] = deque(maxlen=MAX_LAST_LINES)

    @classmethod
    async def start(cls, spec: ProcessSpec, listener: ProcessListener) -> ManagedProcess:
        """Its own session: Ctrl-C in the terminal reaches the launcher only, which drains in order."""
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # no module is taken from the current directory
                "-m",
                "cluster.launch.child",
                str(os.getpid()),
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        except OSError as error:
            raise StartupError(f"{spec.name} cannot be started: {error.strerror or error}") from error
        return cls(spec, child, listener)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def last_words(self) -> list[str]:
        """Its own typed error if it sent one, else the tail of its stderr."""
        if self.failure is not None:
            return [f"{self.failure.code}: {line}" for line in self.failure.message.splitlines() or [""]]
        return list(self._last_lines)

    async def wait(self) -> int:
        """Pass on everything it says until it has ended; its exit code, negative for a signal."""
        readers = [asyncio.create_task(self._read_events()), asyncio.create_task(self._read_logs())]
        try:
            exit_code = await self._child.wait()
            await asyncio.wait(readers, timeout=PIPE_GRACE_S)
            return exit_code
        finally:
            self.send(signal.SIGKILL)  # what it may have started itself
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            self.exited.set()

    def kill_unless_ready(self) -> None:
        if not self.ready.is_set():
            self.was_too_slow = True
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send to its whole process group; one that is gone is not an error."""
        try:
            os.killpg(self._child.pid, number)
        except (ProcessLookupError, PermissionError):  # PermissionError: only zombies are left (macOS)
            return

    async def _read_events(self) -> None:
        assert self._child.stdout is not None
        async for line in _lines(self._child.stdout):
            event = parse(line)
            if event is None:
                self._remember(line)
                continue
            match event:
                case Ready():
                    self.ready.set()
                case Failed():
                    self.failure = event
            self._listener.on_event(self.spec.name, event)

    async def _read_logs(self) -> None:
        assert self._child.stderr is not None
        async for line in _lines(self._child.stderr):
            self._remember(line)

    def _remember(self, line: str) -> None:
        self._last_lines.append(line)
        self._listener.on_log(self.spec.name, line)


def describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Decoded lines, cut at `MAX_LINE_BYTES`: a process that prints without newlines fills no memory."""
    pending = b""
    while chunk := await stream.read(MAX_LINE_BYTES):
        *complete, pending = (pending + chunk).split(b"\n")
        for line in complete:
            yield _text(line)
        if len(pending) >= MAX_LINE_BYTES:
            yield _text(pending)
            pending = b""
    if pending:
        yield _text(pending)


def _text(line: bytes) -> str:
    """Printable text: a process must not be able to write control sequences to the user's terminal."""
    decoded = line.rstrip(b"\r").decode(errors="replace").expandtabs(4)
    return "".join(character if character.isprintable() else "�" for character in decoded)
