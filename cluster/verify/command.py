"""The command itself.

reference  = URL_A at the first concurrency level, or a recorded file
compared   = every other (URL, concurrency level): token ids, and logprobs as fp32 bits
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from cluster.verify.comparison import Cell, Difference, Report, compare
from cluster.verify.model import (
    FORMAT_VERSION,
    Output,
    Recording,
    VerifyOptions,
    read_recording,
    write_recording,
)
from cluster.verify.side import Side, built_in_cases

CONNECT_TIMEOUT_S = 5.0


def make_options(
    num_prompts: int | None, max_tokens: int | None, concurrency: str, against: Path | None
) -> VerifyOptions:  # fmt: skip
    """Of what was typed; None: left out. `ConfigError` for levels that are none, and for what a recording decides."""
    try:
        levels = tuple(int(part) for part in concurrency.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(1 <= level <= 10_000 for level in levels):
        raise ConfigError(f"--concurrency {concurrency}: expected numbers between 1 and 10,000, such as 1,8,32")
    for name, value in (("--prompts", num_prompts), ("--max-tokens", max_tokens)):
        if value is not None and against is not None:
            raise ConfigError(f"{name}: the prompts and the lengths of answers are those of {against}; leave it out")
    default = VerifyOptions()
    return VerifyOptions(
        num_prompts=default.num_prompts if num_prompts is None else num_prompts,
        max_tokens=default.max_tokens if max_tokens is None else max_tokens,
        concurrency=levels,
    )


def run(
    url_a: str,
    url_b: str | None = None,
    *,
    options: VerifyOptions | None = None,
    record: Path | None = None,
    against: Path | None = None,
    console: Console | None = None,
) -> int:
    """The command: 0 if everything is equal, 1 at the first difference (with everything about it).

    With `record` the answers of `url_a` are written to that file, with `against` they are compared with
    those in it. Raises `ConfigError` for a URL that does not answer as needed, or an unusable file.
    """
    console = console or Console()
    if url_b is None and record is None and against is None:
        raise ConfigError("nothing to compare with: give a second URL, --against FILE, or --record FILE")
    report = asyncio.run(verify(url_a, url_b, options or VerifyOptions(), record=record, against=against))
    print_report(report, console)
    return 0 if report.is_equal else 1


async def verify(
    url_a: str,
    url_b: str | None,
    options: VerifyOptions,
    *,
    record: Path | None = None,
    against: Path | None = None,
) -> Report:
    """Ends at the first cell with a difference. `run` explains the arguments."""
    recording = None if against is None else read_recording(against)
    urls = [url.rstrip("/").removesuffix("/v1") for url in (url_a, url_b) if url is not None]
    async with httpx.AsyncClient(
        timeout=httpx.Timeout(options.request_timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=max(options.concurrency)),
        trust_env=False,
    ) as client:
        sides = [await Side.open(client, url) for url in urls]
        cases = await built_in_cases(sides, options) if recording is None else recording.cases
        reference = None if recording is None else recording.outputs
        cells: list[Cell] = []
        for concurrency in options.concurrency:
            for side in sides:
                started_at = time.perf_counter()
                outputs = await side.generate(cases, concurrency, options.num_top_logprobs)
                seconds = time.perf_counter() - started_at
                if reference is None:
                    reference = outputs
                differences = compare(cases, reference, outputs)
                cells.append(_cell(side.url, concurrency, outputs, len(differences), seconds))
                if differences:
                    return Report(cells=tuple(cells), difference=differences[0])
    assert reference is not None
    if record is not None:
        write_recording(record, Recording(version=FORMAT_VERSION, model=sides[0].model, cases=cases, outputs=reference))
    return Report(cells=tuple(cells), difference=None)


def _cell(source: str, concurrency: int, outputs: Sequence[Output], num_mismatches: int, seconds: float) -> Cell:
    return Cell(
        source=source,
        concurrency=concurrency,
        num_prompts=len(outputs),
        num_tokens=sum(len(output.token_ids) for output in outputs),
        num_mismatches=num_mismatches,
        seconds=seconds,
    )


def print_report(report: Report, console: Console) -> None:
    table = Table("source", "in flight", "prompts", "tokens", "tokens/s", "different")
    for cell in report.cells:
        table.add_row(
            cell.source,
            str(cell.concurrency),
            str(cell.num_prompts),
            str(cell.num_tokens),
            f"{cell.num_tokens / max(cell.seconds, 1e-9):.1f}",
            f"[red]{cell.num_mismatches}[/]" if cell.num_mismatches else "[green]0[/]",
        )
    console.print(table)
    if report.difference is None:
        console.print("[green]equal:[/] every token id and every logprob bit")
        return
    console.print(f"[red]different:[/] {_describe(report.difference)}", highlight=False)


def _describe(difference: Difference) -> str:
    return (
        f"prompt {difference.case}, output position {difference.position}: "
        f"token {_shown(difference.reference_token)} logprob {_shown(difference.reference_bits)} in the reference, "
        f"token {_shown(difference.other_token)} logprob {_shown(difference.other_bits)} here"
    )


def _shown(value: int | str | None) -> str:
    return "(none, it had ended)" if value is None else str(value)
