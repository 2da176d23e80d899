"""Rules, dashboards and autoscalers of the chart: well-formed, and about metrics that exist.

That a running server exports them is asserted in tests/integration/test_helm_processes.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm_chart import of_kind, read_values, render
from tests.helm_metrics import all_manifests, expressions, metrics_of, recorded_metrics, rule_files


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return found


def check_rules(promtool: str, text: str, path: Path) -> str:
    path.write_text(text)
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_rules(promtool: str, tmp_path: Path) -> None:
    [text] = rule_files(all_manifests())
    assert "13 rules found" in check_rules(promtool, text, tmp_path / "rules.yaml")


def test_promtool_accepts_the_queries_of_dashboards_and_scalers(promtool: str, tmp_path: Path) -> None:
    queries = sorted(set(expressions(all_manifests())))
    rules = [{"record": f"query_{index}", "expr": query} for index, query in enumerate(queries)]
    text = json.dumps({"groups": [{"name": "queries", "rules": rules}]})
    assert f"{len(queries)} rules found" in check_rules(promtool, text, tmp_path / "queries.json")


def test_every_alert_says_what_it_means_for_this_release() -> None:
    [text] = rule_files(all_manifests())
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    for rule in rules:
        assert 'namespace="serving",app_kubernetes_io_instance="demo"' in rule["expr"]
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert "serving/demo" in rule["annotations"]["summary"]
    assert "@" not in text


def test_an_hpa_reads_what_the_rules_record() -> None:
    manifests = render(read_values("2p4d-tp4"))
    recorded = recorded_metrics(manifests)
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            assert metric["external"]["metric"]["name"] in recorded


def test_dashboards_are_grafanas() -> None:
    [config_map] = [item for item in of_kind(all_manifests(), "ConfigMap") if "dashboards" in item["metadata"]["name"]]
    boards = {name: json.loads(text) for name, text in config_map["data"].items()}
    assert set(boards) == {"requests.json", "workers.json"}
    assert len({board["uid"] for board in boards.values()}) == 2
    for board in boards.values():
        assert len(board["uid"]) <= 40, "Grafana refuses longer ones"
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids) >= 6
        for panel in board["panels"]:
            assert panel["title"]
            assert panel["targets"]
            assert "@" not in str(panel)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('histogram_quantile(0.5, sum by (le) (rate(vllm:ttft_bucket{a="b c"}[5m])))', {"vllm:ttft_bucket"}),
        ("max by (engine) (rate(a_total[5m])) / on (engine) b > 0.5", {"a_total", "b"}),
    ],
)
def test_names_in_an_expression(expression: str, names: set[str]) -> None:
    assert metrics_of(expression) == names
