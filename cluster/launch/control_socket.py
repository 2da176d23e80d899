"""The control socket of a launch: a Unix socket (mode 0600) in its private directory (mode 0700)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgspec

from cluster.errors import ConfigError, StartupError
from cluster.launch.control_messages import (
    MAX_LINE_BYTES,
    SOCKET_NAME,
    Answer,
    Command,
    Doing,
    Refused,
    answer_decoder,
    command_decoder,
)
from cluster.launch.run_directory import launches

REQUEST_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 1800.0  # between two answers: a worker that is added may have to load for long

Handle = Callable[[Command], AsyncIterator[Answer]]


@asynccontextmanager
async def control_server(directory: Path, handle: Handle) -> AsyncIterator[None]:
    """Serves until the block is left; requests that still run then are cancelled."""
    tasks: set[asyncio.Task[None]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _serve_one(reader, writer, handle)
        except (ConnectionError, TimeoutError):
            return  # the asker is gone; what was begun has been done
        finally:
            tasks.discard(task)
            writer.close()

    with _bound(directory) as listener:
        server = await asyncio.start_unix_server(on_connection, sock=listener, limit=MAX_LINE_BYTES)
        try:
            yield
        finally:
            server.close()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handle) -> None:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            command = command_decoder.decode(await reader.readline())
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: a line without end
        await _write(writer, Refused(f"not a request of this version: {error}"))
        return
    async for answer in handle(command):
        with suppress(ConnectionError):  # a change that was begun is carried through
            await _write(writer, answer)


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(msgspec.json.encode(answer) + b"\n")
    await writer.drain()


def find_launch(pid: int | None = None) -> Path:
    """The directory of the launch with this process id, or of the only one. Raises `ConfigError`."""
    running = {owner: directory for owner, directory in launches() if (directory / SOCKET_NAME).exists()}
    if pid is not None:
        if pid not in running:
            raise ConfigError(f"no launch of yours has the process id {pid}; there are: {sorted(running) or 'none'}")
        return running[pid]
    if not running:
        raise ConfigError("no launch of yours is running on this machine; start one with `cluster launch`")
    if len(running) > 1:
        raise ConfigError(
            f"several launches are running, choose one with --pid: {', '.join(map(str, sorted(running)))}"
        )
    return next(iter(running.values()))


def ask(directory: Path, command: Command, show: Callable[[str], None]) -> Answer:
    """Send one command and wait for its last answer; `show` gets the progress. Raises `StartupError`."""
    try:
        with _address(directory) as address, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(address)
            connection.sendall(msgspec.json.encode(command) + b"\n")
            with connection.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES):
                    answer = answer_decoder.decode(line)
                    if not isinstance(answer, Doing):
                        return answer
                    show(answer.what)
    except (OSError, msgspec.DecodeError) as error:
        raise StartupError(f"the launch does not answer: {error}") from error
    raise StartupError("the launch ended before it was done")


@contextmanager
def _bound(directory: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    with listener, _address(directory) as address:
        listener.bind(address)
        (directory / SOCKET_NAME).chmod(0o600)
        yield listener


@contextmanager
def _address(directory: Path) -> Iterator[str]:
    """A short name of the socket: the kernel takes no more than 107 bytes, a temporary directory may have more."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)
