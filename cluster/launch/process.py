"""What a launcher starts: the seam (`Launchable`, `RunningProcess`) and a process of this machine behind it:
its start, its events, its last words and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from cluster.errors import StartupError
from cluster.launch.child import dying_with_us, python_module
from cluster.process_events import Failed, ProcessEvent, Ready, parse

MAX_LAST_LINES = 30
MAX_LINE_BYTES = 16 * 1024
STDOUT, STDERR = 1, 2
PIPE_GRACE_S = 2.0  # for output that is still in the pipes when the process has ended


class ProcessListener(Protocol):
    """Told what a process says, on the event loop."""

    def on_event(self, name: str, event: ProcessEvent) -> None: ...

    def on_log(self, name: str, line: str) -> None: ...


class RunningProcess(Protocol):
    """One life of what is launched: a process here, or the processes of a group's ranks elsewhere."""

    ready: asyncio.Event
    exited: asyncio.Event  # and its output has been passed on
    was_too_slow: bool

    @property
    def last_words(self) -> list[str]: ...

    @property
    def pid(self) -> int: ...

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    @property
    def how_it_ended(self) -> str:
        """Such as `exit code 3`; asked when it has."""
        ...

    async def wait(self) -> int:
        """Until it has ended; its exit code. Cancelled: it is killed."""
        ...

    def kill_unless_ready(self) -> None: ...

    def send(self, number: signal.Signals) -> None:
        """One that is gone is not an error."""
        ...


class Launchable(Protocol):
    """What a launcher keeps alive. Raises `StartupError` where it cannot be started."""

    @property
    def name(self) -> str: ...

    @property
    def stop_order(self) -> int:
        """Lower ones are drained first."""
        ...

    async def prepare(self, listener: ProcessListener) -> None:
        """Before every start: get what it needs to run. May take long; cancelled, it leaves nothing running."""
        ...

    async def start(self, listener: ProcessListener) -> RunningProcess: ...


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A `Launchable` on this machine: `python -m <command>`."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_order: int = 0
    withheld: tuple[str, ...] = ()  # variables of the launcher's environment that are not for it

    async def prepare(self, listener: ProcessListener) -> None:
        """It needs nothing but this machine."""

    async def start(self, listener: ProcessListener) -> ManagedProcess:
        return await ManagedProcess.start(self, listener)


class ManagedProcess:
    """Made by `start`. The caller awaits `wait`, which also ends whatever is left of its group."""

    def __init__(self, spec: ProcessSpec, listener: ProcessListener) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        self.exited = asyncio.Event()  # and its output has been passed on
        self.failure: Failed | None = None
        self.was_too_slow = False
        self._listener = listener
        self._last_lines: deque[str] = deque(maxlen=MAX_LAST_LINES)
        self._protocol = _ChildProtocol(self._on_line)
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(cls, spec: ProcessSpec, listener: ProcessListener) -> ManagedProcess:
        """Its own session: Ctrl-C in the terminal reaches the launcher only, which drains in order."""
        process = cls(spec, listener)
        inherited = {name: value for name, value in os.environ.items() if name not in spec.withheld}
        try:
            process._transport, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: process._protocol,
                *dying_with_us(python_module(*spec.command)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**inherited, **spec.environment},
                start_new_session=True,
            )
        except OSError as error:
            raise StartupError(f"{spec.name} cannot be started: {error.strerror or error}") from error
        return process

    @property
    def last_words(self) -> list[str]:
        """Its own typed error if it sent one, else the tail of its stderr."""
        if self.failure is not None:
            return [f"{self.failure.code}: {line}" for line in self.failure.message.splitlines() or [""]]
        return list(self._last_lines)

    @property
    def pid(self) -> int:
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._transport is not None
        return self._transport.get_returncode()

    @property
    def how_it_ended(self) -> str:
        assert self.exit_code is not None
        return describe_exit(self.exit_code)

    async def wait(self) -> int:
        """Until it has ended; its exit code, negative for a signal.

        What it started itself is killed then, and may have held its pipes open: so the end of the
        process is awaited first, the end of its output after that and not for long.
        """
        assert self._transport is not None
        try:
            await self._protocol.process_ended.wait()
            self.send(signal.SIGKILL)
            with suppress(TimeoutError):  # a process outside of the group has the pipes: nothing of ours is lost
                await asyncio.wait_for(self._protocol.pipes_closed.wait(), PIPE_GRACE_S)
            self._protocol.flush()
            exit_code = self._transport.get_returncode()
            assert exit_code is not None
            return exit_code
        finally:
            if not self._protocol.process_ended.is_set():  # the caller gives up
                self.send(signal.SIGKILL)
            self._transport.close()
            self.exited.set()

    def kill_unless_ready(self) -> None:
        if not self.ready.is_set():
            self.was_too_slow = True
            self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send to its whole process group; one that is gone is not an error."""
        assert self._transport is not None
        try:
            os.killpg(self._transport.get_pid(), number)
        except (ProcessLookupError, PermissionError):  # PermissionError: only zombies are left (macOS)
            return

    def _on_line(self, pipe: int, line: str) -> None:
        event = parse(line) if pipe == STDOUT else None
        if event is None:
            self._last_lines.append(line)
            self._listener.on_log(self.spec.name, line)
            return
        match event:
            case Ready():
                self.ready.set()
            case Failed():
                self.failure = event
        self._listener.on_event(self.spec.name, event)


class _ChildProtocol(asyncio.SubprocessProtocol):
    """Lines of both pipes, and two separate ends: of the process, and of its pipes."""

    def __init__(self, on_line: Callable[[int, str], None]) -> None:
        self.process_ended = asyncio.Event()
        self.pipes_closed = asyncio.Event()
        self._on_line = on_line
        self._pending = {STDOUT: b"", STDERR: b""}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Lines are cut at `MAX_LINE_BYTES`: a process that prints without newlines fills no memory."""
        *complete, pending = (self._pending[fd] + data).split(b"\n")
        if len(pending) >= MAX_LINE_BYTES:
            complete.append(pending)
            pending = b""
        self._pending[fd] = pending
        for line in complete:
            for start in range(0, max(len(line), 1), MAX_LINE_BYTES):
                self._on_line(fd, _text(line[start : start + MAX_LINE_BYTES]))

    def process_exited(self) -> None:
        self.process_ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipes_closed.set()

    def flush(self) -> None:
        """The last line of a process that ended without a newline."""
        for fd, pending in self._pending.items():
            if pending:
                self._on_line(fd, _text(pending))


def describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def _text(line: bytes) -> str:
    """Printable text: a process must not be able to write control sequences to the user's terminal."""
    decoded = line.rstrip(b"\r").decode(errors="replace").expandtabs(4)
    return "".join(character if character.isprintable() else "�" for character in decoded)
