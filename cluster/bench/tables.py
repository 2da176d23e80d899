"""What is printed: the table of one run, the table of two."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from cluster.bench.measure import PERCENTILES, Statistics, Summary

_MAX_EXAMPLE = 160  # characters of what a failed request was told
_LATENCIES = (
    ("time to first token", "ttft"),
    ("between chunks", "itl"),
    ("mean per token", "tpot"),
    ("end to end", "e2e"),
)


def latency_table(summary: Summary) -> Table:
    table = Table("milliseconds", "mean", *(f"p{percent:g}" for percent in PERCENTILES), "max", "values")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, statistics in latencies(summary):
        table.add_row(name, *latency_cells(statistics))
    return table


def latencies(summary: Summary) -> Iterator[tuple[str, Statistics]]:
    for name, field in _LATENCIES:
        statistics: Statistics | None = getattr(summary, field)
        if statistics is not None:
            yield name, statistics


def latency_cells(statistics: Statistics) -> list[str]:
    values = (statistics.mean, *statistics.percentiles, statistics.maximum)
    return [*(milliseconds(value) for value in values), f"{statistics.count:,}"]


def rate_lines(summary: Summary) -> list[tuple[str, str]]:
    """Everything but the latencies, as (name, value)."""
    lines = [
        ("requests", f"{summary.num_requests:,}, {summary.num_failed:,} failed, in {summary.duration_s:.2f} s"),
        ("completed", f"{summary.requests_per_s:.3f} requests/s"),
        ("throughput", f"{summary.input_tokens_per_s:,.1f} tokens/s in, {summary.output_tokens_per_s:,.1f} out"),
        ("tokens a request", f"{summary.mean_prompt_tokens:.1f} in, {summary.mean_output_tokens:.1f} out"),
    ]
    if summary.goodput_per_s is not None and summary.good_share is not None:
        lines.append(("goodput", f"{summary.goodput_per_s:.3f} requests/s ({summary.good_share:.1%} met the SLO)"))
    if summary.lag is not None and summary.lag.maximum > 0:
        lag = f"p50 {milliseconds(summary.lag.median)} ms, max {milliseconds(summary.lag.maximum)} ms"
        lines.append(("sent late by", lag))
    for kind, count in sorted(summary.errors.items()):
        example = summary.error_examples.get(kind, "")
        lines.append((f"failed: {kind}", f"{count:,}{': ' if example else ''}{example[:_MAX_EXAMPLE]}"))
    return lines


def rate_table(summary: Summary) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rate_lines(summary):
        table.add_row(name, value, style="red" if name.startswith("failed") else "")
    return table


def comparison_table(first: Summary, second: Summary) -> Table:
    table = Table("", "A", "B", "B / A")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, a, b in _compared(first, second):
        ratio = f"{b / a:.3f}" if a else "-"
        table.add_row(name, f"{a:,.3f}", f"{b:,.3f}", ratio)
    return table


def _compared(first: Summary, second: Summary) -> Iterator[tuple[str, float, float]]:
    for name, field in (
        ("requests/s", "requests_per_s"),
        ("tokens/s in", "input_tokens_per_s"),
        ("tokens/s out", "output_tokens_per_s"),
        ("failed", "num_failed"),
        ("goodput, requests/s", "goodput_per_s"),
    ):
        a, b = getattr(first, field), getattr(second, field)
        if a is not None and b is not None:
            yield name, a, b
    for name, field in _LATENCIES:
        a_statistics, b_statistics = getattr(first, field), getattr(second, field)
        if a_statistics is None or b_statistics is None:
            continue
        for percent, a, b in zip(PERCENTILES, a_statistics.percentiles, b_statistics.percentiles, strict=True):
            yield f"{name}, p{percent:g} ms", 1e3 * a, 1e3 * b


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.3f}" if value < 10 else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
