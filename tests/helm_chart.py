"""The chart rendered by Helm itself, for tests and for the record in `benchmarks/helm.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "tandem"
VALUES_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
KUBERNETES = "1.37"
RELEASE, NAMESPACE = "demo", "serving"

Values = dict[str, Any]
Manifest = dict[str, Any]


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def read_values(name: str) -> Values:
    """Of `ci/<name>-values.yaml`."""
    values: Values = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
    return values


def render(values: Values) -> list[Manifest]:
    """All objects. `HelmError` when the schema or a `fail` refuses the values."""
    chart().validate_schema(values)
    texts = chart().render(values, name=RELEASE, namespace=NAMESPACE, is_install=True)
    return [
        manifest
        for path, text in sorted(texts.items())
        if path.endswith(".yaml")
        for manifest in yaml.safe_load_all(text)
        if manifest
    ]


def lint_problems(values: Values) -> list[str]:
    """Warnings and errors of `helm lint --strict`."""
    report = helm_python.lint(CHART, values, strict=True)
    return [*report["errors"], *(message["error"] for message in report["messages"] if message["severity"] >= 2)]


def changed(values: Values, **changes: Any) -> Values:
    """A copy with other values: `changed(v, prefill__port=1)`; None removes a key."""
    result = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return result


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: list[Manifest], kind: str, role: str) -> Manifest:
    [manifest] = [item for item in of_kind(manifests, kind) if item["metadata"]["name"] == f"{RELEASE}-tandem-{role}"]
    return manifest


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(role, pod template) of every workload."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment":
                yield manifest["metadata"]["labels"]["app.kubernetes.io/component"], spec["template"]
            case "LeaderWorkerSet":
                role = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
                yield role, spec["leaderWorkerTemplate"]["workerTemplate"]
            case "DisaggregatedSet":
                for role in spec["roles"]:
                    yield role["name"], role["spec"]["leaderWorkerTemplate"]["workerTemplate"]
            case "RayCluster":
                yield "router", spec["headGroupSpec"]["template"]
                for group in spec["workerGroupSpecs"]:
                    yield group["groupName"], group["template"]


def check_native(manifests: list[Manifest]) -> list[Manifest]:
    """Validate strictly what Kubernetes itself defines, pod templates inside custom resources included.
    Returns the custom resources."""
    custom = []
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            custom.append(manifest)
    for role, template in pod_templates(custom):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role}, "template": template}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
    return custom
