"""The actor that supervises the process of one rank, on the node where Ray has put it.

It starts a process when it is told to, passes on what that says, and sees to its end: the process dies with the actor
(PR_SET_PDEATHSIG), and the actor ends when its launcher has not been heard of for `LAUNCHER_SILENCE_S`. Whether a
process is started again is decided by the launcher, because the ranks of a group live and die together.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import time
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

from cluster.errors import StartupError
from cluster.launch.ports import choose_free_port
from cluster.launch.process import ManagedProcess, ProcessSpec
from cluster.launch.ray_messages import (
    Batch,
    Ended,
    Logged,
    News,
    NotStarted,
    Place,
    Said,
    Started,
    encode,
    order_decoder,
)
from cluster.launch.run_directory import replace_private, run_directory
from cluster.process_events import ProcessEvent

NEWS_PAUSE_S = 5.0  # the longest time until a question for news is answered
LAUNCHER_SILENCE_S = 45.0
LEAVE_S = 1.0  # for the answer of `leave` to be sent
MAX_NEWS = 10_000  # kept for a launcher that does not ask; the oldest log lines go first
PYTHON_DEBUGGER = "PYTHONBREAKPOINT"  # Ray points it at a debugger that listens on the network


class RankActor:
    """Made an actor by `ray.remote`; all methods run on its event loop. One process at a time."""

    def __init__(self) -> None:
        self._resources = ExitStack()  # closed by `close`; what a killed actor leaves, the next one removes
        self._directory = self._resources.enter_context(run_directory())
        self._process: ManagedProcess | None = None
        self._news: deque[News] = deque()
        self._first_number = 0  # of the oldest in `_news`
        self._has_news = asyncio.Event()
        self._heard_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def place(self) -> bytes:
        """`Place`. The first call, and the sign of life that later ones ask for."""
        import ray  # there on the node; this module can be imported without it

        self._heard_at = time.monotonic()
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._end_without_launcher()))
        place = Place(
            node_id=ray.get_runtime_context().get_node_id(),
            host=ray.util.get_node_ip_address(),
            directory=str(self._directory),
            version=importlib.metadata.version("tandem-serving"),
        )
        return encode(place)

    async def choose_port(self, host: str) -> int:
        return choose_free_port(host)

    async def put(self, name: str, content: bytes) -> None:
        """Replace a file in the private directory."""
        replace_private(self._directory / Path(name).name, content)

    async def start(self, encoded: bytes) -> bytes:
        """Of an `Order`, `Started` or `NotStarted`. A process of before is killed."""
        order = order_decoder.decode(encoded)
        await self._end_process()
        for name, content in order.files.items():
            await self.put(name, content)
        withheld = tuple(name for name in os.environ if name.startswith("RAY_") or name == PYTHON_DEBUGGER)
        spec = ProcessSpec(order.name, order.command, order.environment, withheld=withheld)
        self._first_number += len(self._news)
        self._news.clear()
        try:
            process = self._process = await ManagedProcess.start(spec, self)
        except StartupError as error:
            return encode(NotStarted(error.message))
        self._tasks[1:] = [asyncio.create_task(self._follow(process))]
        return encode(Started(process.pid))

    async def news(self, first_number: int) -> bytes:
        """`Batch` from `first_number` on, which is forgotten up to there; empty after `NEWS_PAUSE_S`."""
        self._heard_at = time.monotonic()
        while self._news and self._first_number < first_number:
            self._news.popleft()
            self._first_number += 1
        if not self._news:
            self._has_news.clear()
            with suppress(TimeoutError):  # no news are an answer too: the asker knows that the actor lives
                await asyncio.wait_for(self._has_news.wait(), NEWS_PAUSE_S)
        batch = Batch(tuple(self._news), self._first_number + len(self._news))
        return encode(batch)

    async def signal(self, number: int) -> None:
        if self._process is not None and not self._process.exited.is_set():
            self._process.send(signal.Signals(number))

    async def leave(self) -> None:
        """`close`, and soon the actor ends itself: it is killed through Ray's head, which may be gone."""
        await self.close()
        asyncio.get_running_loop().call_later(LEAVE_S, os._exit, 0)

    async def close(self) -> None:
        """Kill the process, remove the directory. An actor that is killed has no time for it."""
        await self._end_process()
        self._resources.close()

    def on_event(self, name: str, event: ProcessEvent) -> None:
        self._tell(Said(event))

    def on_log(self, name: str, line: str) -> None:
        self._tell(Logged(line))

    def _tell(self, news: News) -> None:
        if len(self._news) >= MAX_NEWS and isinstance(self._news[0], Logged):
            self._news.popleft()
            self._first_number += 1
        self._news.append(news)
        self._has_news.set()

    async def _follow(self, process: ManagedProcess) -> None:
        exit_code = await process.wait()
        self._tell(Ended(exit_code, process.how_it_ended, tuple(process.last_words)))

    async def _end_process(self) -> None:
        await self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.exited.wait()

    async def _end_without_launcher(self) -> None:
        while True:
            silence_left_s = self._heard_at + LAUNCHER_SILENCE_S - time.monotonic()
            if silence_left_s <= 0:
                break
            await asyncio.sleep(silence_left_s)
        await self.close()
        os._exit(1)  # an actor has no gentler way to end itself from a task of its own
