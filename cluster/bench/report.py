"""The HTML report of a run: one file, no network, no script."""

from __future__ import annotations

from html import escape

from cluster.bench.measure import PERCENTILES, Meter, Samples, Summary
from cluster.bench.result_file import RunLine
from cluster.bench.svg import plot
from cluster.bench.tables import latencies, latency_cells, rate_lines

_STYLE = """
:root { color-scheme: light dark; --text: #1c2530; --dim: #66717f; --grid: #dfe4ea; --page: #fff; --box: #f6f8fa;
  --c0: #2266cc; --c1: #c4501b; --c2: #2b8a4b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --dim: #9aa5b3; --grid: #333c48; --page: #14181e;
  --box: #1b2129; --c0: #6aa5ff; --c1: #ff935c; --c2: #6fd08c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { color: var(--dim); margin-top: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; margin: 1rem 0; }
figure { margin: 0; padding: 1rem; background: var(--box); border-radius: 8px; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child, table.plain td { text-align: left; }
th { color: var(--dim); font-weight: 500; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim); }
svg .right { text-anchor: end; } svg .middle { text-anchor: middle; } svg .grid { stroke: var(--grid); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } svg circle { opacity: .6; }
polyline.s0 { stroke: var(--c0); } polyline.s1 { stroke: var(--c1); } polyline.s2 { stroke: var(--c2); }
circle.s0, rect.s0 { fill: var(--c0); } circle.s1, rect.s1 { fill: var(--c1); } rect.s2 { fill: var(--c2); }
"""


def html_report(run: RunLine, summary: Summary, meter: Meter, *, is_complete: bool) -> str:
    interrupted = "" if is_complete else " The run was interrupted; this is what had been measured."
    options = ", ".join(f"{name} {value}" for name, value in run.options.items() if value is not None)
    figures = "".join(f"<figure><h2>{escape(title)}</h2>{svg}</figure>" for title, svg in _plots(meter))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>cluster bench: {escape(run.model)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>cluster bench: {escape(run.model)}</h1>"
        f"<p>{escape(run.url)}, {escape(run.started)}. {escape(options)}.{interrupted}</p>"
        f"{_rates(summary)}{_latencies(summary)}<div class=plots>{figures}</div></body></html>\n"
    )


def _rates(summary: Summary) -> str:
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(value)}" for name, value in rate_lines(summary))
    return f"<table class=plain>{rows}</table>"


def _latencies(summary: Summary) -> str:
    names = ("milliseconds", "mean", *(f"p{percent:g}" for percent in PERCENTILES), "max", "values")
    head = "".join(f"<th>{name}" for name in names)
    rows = "".join(
        f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in latency_cells(statistics))
        for name, statistics in latencies(summary)
    )
    return f"<table><tr>{head}{rows}</table>"


def _plots(meter: Meter) -> list[tuple[str, str]]:
    def curve(samples: Samples) -> list[tuple[float, float]]:
        return [(1e3 * value, 100 * share) for value, share in samples.curve()]

    origin_s = int(meter.first_s or 0.0)
    last = max(meter.tokens_by_second, default=0)
    rates = [(float(at - origin_s), meter.tokens_by_second[at]) for at in range(origin_s, last + 1)]
    firsts = [(at, 1e3 * ttft_s) for at, ttft_s in meter.scatter]
    gaps = [("between chunks", curve(meter.itl)), ("mean of a request", curve(meter.tpot))]
    share = "share of values, %"
    return [
        ("Time to first token", plot([("", curve(meter.ttft))], x_label="milliseconds", y_label=share)),
        ("Time between tokens", plot(gaps, x_label="milliseconds", y_label=share)),
        ("End to end", plot([("", curve(meter.e2e))], x_label="milliseconds", y_label=share)),
        ("Throughput", plot([("", rates)], x_label="second of the run", y_label="output tokens/s")),
        (
            "Time to first token over the run",
            plot([("", firsts)], x_label="request sent at, s", y_label="milliseconds", dots=True),
        ),
    ]
