"""Writes docs/metrics.md from what /metrics renders: `python -m cluster.router.metrics_reference > docs/metrics.md`.
A test keeps the file up to date."""

from __future__ import annotations

import sys

from cluster.router.metric_tables import EXTRA_LABELS, WORKER_COUNTERS, WORKER_GAUGES, WORKER_HISTOGRAMS
from cluster.router.metrics import RouterMetrics
from cluster.router.pool import WorkerPool

INTRODUCTION = """\
# Metrics

<!-- Written by `make docs` from cluster/router/metric_tables.py; edit the texts there. -->

`GET /metrics` of a router answers in Prometheus' text format. Names that begin with `vllm:` mean what they mean in
vLLM, so that its dashboards read us; those that begin with `tandem_` are ours. Every metric has the labels
`model_name` and `engine`: `router` for what the router counts itself, and `prefill-0`, `decode-1`, ... for what a
worker counts. A worker sends its numbers to every router: with several routers, take them from one (or `max by
(engine)`), and sum only what has `engine="router"`. A worker's counters begin at zero with each start of its process.

Histograms of workers are sent twice a second at most, everything else with each frame.
"""


def reference() -> str:
    of_workers = {row[0] for row in (*WORKER_GAUGES, *WORKER_COUNTERS, *WORKER_HISTOGRAMS)}
    of_workers |= {"tandem_worker_ready", "tandem_worker_in_flight", "tandem_worker_drains"}
    of_workers |= {"vllm:spec_decode_num_accepted_tokens_per_pos"}
    families = list(RouterMetrics("", WorkerPool(prefill=None, decode=[])).collect())
    sections = (
        ("Counted by the router", [family for family in families if family.name not in of_workers]),
        ("By worker", [family for family in families if family.name in of_workers]),
    )
    lines = [INTRODUCTION]
    for title, members in sections:
        lines += [f"## {title}", "", "| name | type | more labels | meaning |", "|---|---|---|---|"]
        for family in members:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(f"`{label}`" for label in EXTRA_LABELS.get(family.name, ()))
            lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
