"""Which metrics the chart's dashboards, rules and autoscalers ask for, and which a server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import yaml
from prometheus_client import Metric

from tests.helm_chart import Manifest, changed, of_kind, read_values, render

_NOT_METRICS = re.compile(r'\{[^}]*\}|"[^"]*"|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)')
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\s*\(?")
_OPERATORS = {"and", "or", "unless", "by", "without"}


def metrics_of(expression: str) -> set[str]:
    """The metric names in a PromQL expression."""
    words = _WORD.findall(_NOT_METRICS.sub(" ", expression))
    return {word.strip() for word in words if not word.endswith("(")} - _OPERATORS


def rule_files(manifests: list[Manifest]) -> list[str]:
    return [
        text
        for manifest in of_kind(manifests, "ConfigMap")
        for name, text in manifest["data"].items()
        if name.endswith(".rules.yaml")
    ]


def expressions(manifests: list[Manifest]) -> Iterator[str]:
    """Every PromQL query of the chart."""
    for manifest in of_kind(manifests, "ConfigMap"):
        for name, text in manifest["data"].items():
            if name.endswith(".json") and name != "config.json":
                yield from (target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"])
    for text in rule_files(manifests):
        yield from (rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"])
    for scaled in of_kind(manifests, "ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])


def all_manifests() -> list[Manifest]:
    """With everything that asks for metrics."""
    scaling = {f"{role}__autoscaling__type": "keda" for role in ("router", "prefill", "decode")}
    return render(changed(read_values("2p4d-tp4"), **scaling))


def used_metrics() -> set[str]:
    names = {name for expression in expressions(all_manifests()) for name in metrics_of(expression)}
    assert len(names) > 15, "the expressions were not found"
    return names


def recorded_metrics(manifests: list[Manifest]) -> set[str]:
    rules = [
        rule for text in rule_files(manifests) for group in yaml.safe_load(text)["groups"] for rule in group["rules"]
    ]
    return {rule["record"] for rule in rules if "record" in rule}


def exported_names(families: Iterable[Metric]) -> set[str]:
    """What a query can name, samples or not: a counter's family has no `_total`, a histogram has buckets."""
    names = set()
    for family in families:
        match family.type:
            case "counter":
                names.add(f"{family.name}_total")
            case "histogram":
                names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case _:
                names.add(family.name)
    return names
