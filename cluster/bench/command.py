"""What `cluster bench` does, from checked options to the exit code."""

from __future__ import annotations

import asyncio
import signal
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.bench.http_client import HttpClient, RequestFailed
from cluster.bench.measure import Meter, RequestRecord, Summary
from cluster.bench.options import BenchOptions, check_options
from cluster.bench.prompts import prompt_source
from cluster.bench.report import html_report
from cluster.bench.result_file import FORMAT_VERSION, ResultFile, RunLine, read_result
from cluster.bench.runner import Runner, find_model
from cluster.bench.tables import comparison_table, latency_table, milliseconds, rate_table
from cluster.errors import ConfigError

REDRAW_S = 0.25
PLAIN_LINE_S = 5.0  # without a terminal
MAX_LAG_SHARE = 0.1  # of the median time to first token; above it the client was too slow
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def run_bench(
    options: BenchOptions, console: Console, *, api_key: str = "", output: Path | None = None, html: Path | None = None
) -> int:
    """Run, print, write. The exit code: 0, 1 if a request failed, 130 after Ctrl-C. Raises `ConfigError`."""
    check_options(options)
    return uvloop.run(_run(options, console, api_key, output, html))


async def _run(options: BenchOptions, console: Console, api_key: str, output: Path | None, html: Path | None) -> int:
    client = HttpClient(options.url, api_key)
    meter = Meter(options.slo)
    try:
        model = await find_model(client, options)
        prompts, is_exact = await prompt_source(client, options, model)
        if not is_exact:
            console.print("no /tokenize there: one token per word is assumed for the prompts", style="yellow")
        run = _run_line(options, model)
        with ExitStack() as stack:
            result = stack.enter_context(ResultFile(output, run)) if output is not None else None

            def on_record(record: RequestRecord, gaps: array[float]) -> None:
                meter.add(record, gaps)
                if result is not None:
                    result.add(record, gaps)

            runner = Runner(options, client, model, prompts, on_record)
            is_complete = await _until_done_or_interrupted(runner, meter, options, console)
            summary = meter.summary()
            if result is not None:
                result.end(summary, is_complete=is_complete)
    finally:
        client.close()
    _print(summary, console, is_complete=is_complete)
    if html is not None:
        _write(html, html_report(run, summary, meter, is_complete=is_complete))
    if not is_complete:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if summary.num_failed or not summary.num_requests else 0


async def _until_done_or_interrupted(runner: Runner, meter: Meter, options: BenchOptions, console: Console) -> bool:
    """False: interrupted, and whatever was in flight is not counted."""
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, interrupted.set)
    stopping = loop.create_task(interrupted.wait())
    working = loop.create_task(_work(runner, meter, options, console))
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
        for number in numbers:
            loop.remove_signal_handler(number)


async def _work(runner: Runner, meter: Meter, options: BenchOptions, console: Console) -> None:
    if options.num_warmup:
        console.print(f"warming up with {options.num_warmup} requests")
        try:
            await runner.warm_up()
        except RequestFailed as error:
            raise ConfigError(f"the warm-up failed ({error.kind}): {error.message}") from error
    showing = asyncio.create_task(_show(runner, meter, options, console))
    try:
        await runner.run()
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _show(runner: Runner, meter: Meter, options: BenchOptions, console: Console) -> None:
    if not console.is_terminal:
        while True:
            await asyncio.sleep(PLAIN_LINE_S)
            console.print(f"{runner.elapsed_s:.0f} s: {_state(runner, meter)}", highlight=False)
    with _bar(options, console) as (progress, task):
        while True:
            done = runner.elapsed_s if options.num_requests is None else meter.num_requests
            progress.update(task, completed=done, state=_state(runner, meter))
            await asyncio.sleep(REDRAW_S)


@contextmanager
def _bar(options: BenchOptions, console: Console) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("", total=options.num_requests or options.duration_s, state="")


def _state(runner: Runner, meter: Meter) -> str:
    failed = f", {meter.num_failed:,} failed" if meter.num_failed else ""
    return f"{meter.num_requests:,} answered{failed}, {runner.num_in_flight:,} in flight"


def _print(summary: Summary, console: Console, *, is_complete: bool) -> None:
    if not is_complete:
        console.print("interrupted: this is what had been measured", style="yellow")
    console.print(latency_table(summary))
    console.print(rate_table(summary))
    if (
        summary.lag is not None
        and summary.ttft is not None
        and summary.lag.median > MAX_LAG_SHARE * summary.ttft.median
    ):
        lag = milliseconds(summary.lag.median)
        console.print(f"requests were sent {lag} ms late: this client, not the server, was the limit", style="yellow")


def _run_line(options: BenchOptions, model: str) -> RunLine:
    shown: dict[str, str | int | float | bool | None] = {}
    for name in options.__struct_fields__:
        value = getattr(options, name)
        match value:
            case None | bool() | int() | float() | str():
                shown[name] = value
            case msgspec.Struct() if name == "slo":
                bounds = msgspec.structs.asdict(value).items()
                shown[name] = ",".join(f"{key}={bound:g}s" for key, bound in bounds if bound is not None) or None
            case _:
                shown[name] = str(value)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    del shown["url"], shown["model"]
    return RunLine(version=FORMAT_VERSION, url=options.url, model=model, options=shown, started=started)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def compare(path_a: Path, path_b: Path, console: Console) -> None:
    """Print two results side by side. Raises `ConfigError`."""
    (run_a, line_a), (run_b, line_b) = read_result(path_a), read_result(path_b)
    for letter, run, line in (("A", run_a, line_a), ("B", run_b, line_b)):
        interrupted = "" if line.is_complete else ", interrupted"
        console.print(f"{letter}: {run.model} at {run.url}, {run.started}{interrupted}", highlight=False)
    names = [name for name in run_a.options if run_a.options[name] != run_b.options.get(name)]
    if names:
        console.print(f"the runs differ in: {', '.join(names)}", style="yellow")
    console.print(comparison_table(line_a.summary, line_b.summary))
