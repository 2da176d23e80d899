"""What `cluster launch` shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.launch.local import LaunchView
from cluster.process_events import Failed, ProcessEvent, Progress, Ready

PLAIN_PROGRESS_EVERY_S = 2.0
REFRESHES_PER_S = 8
LARGEST_COUNT = 9999  # larger totals are bytes: a percentage says more


@dataclass(slots=True)
class Serving:
    """What the user needs to know once requests are answered."""

    url: str  # changes when a router that Ray has placed moves
    model_name: str
    summary: str  # "1 prefill + 1 decode worker"

    @property
    def curl(self) -> str:
        body = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,  # a small model rambles otherwise, and without a bound it may do so for long
            "max_tokens": 64,
        }
        content_type = shlex.quote("Content-Type: application/json")
        return f"curl -s {self.url}/v1/chat/completions -H {content_type} -d {shlex.quote(json.dumps(body))}"

    def lines(self) -> list[str]:
        return [f"Serving {self.model_name} at {self.url}/v1 ({self.summary})", f"Try: {self.curl}"]


class PlainView:
    """One line per piece of news; progress no more often than every other second. `serving` None: others tell that."""

    def __init__(
        self, serving: Serving | None, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._serving = serving
        self._stream = stream or sys.stdout
        self._clock = clock
        self._last_progress: dict[str, tuple[str, float]] = {}

    def on_start(self, name: str) -> None:
        self._line(name, "starting")

    def on_event(self, name: str, event: ProcessEvent) -> None:
        match event:
            case Progress(what, done, total):
                last_what, last_time = self._last_progress.get(name, ("", 0.0))
                if what == last_what and self._clock() - last_time < PLAIN_PROGRESS_EVERY_S:
                    return
                self._last_progress[name] = (what, self._clock())
                self._line(name, f"{what} {_fraction(done, total)}".rstrip())
            case Ready(address, detail):
                self._line(name, f"ready at {address} {detail}".rstrip())
            case Failed():
                return  # told as its last words when it is gone

    def on_log(self, name: str, line: str) -> None:
        self._line(name, line)

    def on_death(self, name: str, how: str, last_words: Sequence[str], restart_in_s: float) -> None:
        self._line(name, _death(how, last_words, restart_in_s))
        for word in last_words:
            self._line(name, f"    {word}")

    def on_serving(self) -> None:
        for line in self._serving.lines() if self._serving is not None else ():
            self._line("cluster", line)

    def on_stop(self, reason: str) -> None:
        self._line("cluster", reason)

    def _line(self, name: str, text: str) -> None:
        self._stream.write(f"{name:>10} | {text}\n")
        self._stream.flush()


@dataclass(slots=True)
class _Row:
    state: str = "waiting"
    progress: Progress | None = None
    started: float = field(default_factory=time.monotonic)


class LiveView:
    """A table with a row per process while they start; news and logs scroll by above it."""

    def __init__(self, serving: Serving, names: Sequence[str], console: Console) -> None:
        self._serving = serving
        self._console = console
        self._rows = {name: _Row() for name in names}
        self._live = Live(
            get_renderable=self._table, console=console, refresh_per_second=REFRESHES_PER_S, transient=True
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._live:
            yield

    def on_start(self, name: str) -> None:
        self._rows[name] = _Row(state="starting")

    def on_event(self, name: str, event: ProcessEvent) -> None:
        row = self._rows[name]
        match event:
            case Progress():
                row.state, row.progress = event.what, event
            case Ready(address, detail):
                seconds = time.monotonic() - row.started
                row.state, row.progress = "ready", None
                self._news(name, f"ready at {address} after {seconds:.1f} s {detail}".rstrip(), "green")
            case Failed():
                row.state, row.progress = "failed", None

    def on_log(self, name: str, line: str) -> None:
        self._news(name, line, "dim")

    def on_death(self, name: str, how: str, last_words: Sequence[str], restart_in_s: float) -> None:
        self._rows[name] = _Row(state=f"died, again in {restart_in_s:g} s")
        self._news(name, _death(how, last_words, restart_in_s), "bold red")
        for word in last_words:
            self._news(name, f"    {word}", "red")

    def on_serving(self) -> None:
        for line, style in zip(self._serving.lines(), ("bold green", "default"), strict=True):
            self._console.print(Text(line, style=style), soft_wrap=True)
        self._console.print(Text("Ctrl-C drains and stops.", style="dim"))

    def on_stop(self, reason: str) -> None:
        self._news("cluster", reason, "yellow")

    def _news(self, name: str, text: str, style: str) -> None:
        self._console.print(Text(f"{name:>10} │ ", style="cyan").append(text, style=style), soft_wrap=True)

    def _table(self) -> Table | Text:
        if all(row.state == "ready" for row in self._rows.values()):
            return Text()
        table = Table.grid(padding=(0, 2))
        for name, row in self._rows.items():
            bar: ProgressBar | Text = Text()
            count = ""
            if row.progress is not None:
                total = row.progress.total
                bar = ProgressBar(total=total or None, completed=row.progress.done, width=30, pulse=not total)
                count = _fraction(row.progress.done, total)
            style = {"ready": "green", "failed": "red"}.get(row.state, "yellow")
            table.add_row(Text(f"{name:>10}", style="cyan"), Text(row.state, style=style), bar, count)
        return table


@contextmanager
def launch_view(serving: Serving, names: Sequence[str], console: Console) -> Iterator[LaunchView]:
    """The view that fits where the output goes."""
    if not console.is_terminal:
        yield PlainView(serving, console.file)
        return
    view = LiveView(serving, names, console)
    with view.shown():
        yield view


def _fraction(done: int, total: int) -> str:
    if not total:
        return f"{done:,}" if done else ""
    return f"{done:,}/{total:,}" if total <= LARGEST_COUNT else f"{done / total:.0%}"


def _death(how: str, last_words: Sequence[str], restart_in_s: float) -> str:
    words = "Its last words:" if last_words else "It said nothing."
    return f"died ({how}), starting it again in {restart_in_s:g} s. {words}"
