"""Counts what the chart's tests prove: values files that lint, render and validate, and bad values that are refused.

python -m benchmarks.helm                      # append to benchmarks/results
python -m benchmarks.helm --crds DIRECTORY     # also validate against complete CRDs (`kubectl get crd -o yaml`)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import yaml

from benchmarks.results import Parameter, append_result
from tests.helm_bad_values import BAD_VALUES
from tests.helm_chart import (
    KUBERNETES,
    VALUES_FILES,
    changed,
    check_native,
    lint_problems,
    read_values,
    render,
)
from tests.helm_custom_resources import SCHEMAS, Schema

Schemas = dict[tuple[str, str], Schema]


def is_good(name: str, schemas: Schemas) -> bool:
    """Lints strictly, renders, and every object is valid."""
    problems = lint_problems(read_values(name))
    try:
        for manifest in check_native(render(read_values(name))):
            jsonschema.validate(manifest, schemas[manifest["apiVersion"], manifest["kind"]])
    except (helm_python.HelmError, kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
        problems.append(str(error))
    for problem in problems:
        print(f"{name}: {problem}")
    return not problems


def is_refused(changes: dict[str, Any], reason: str) -> bool:
    try:
        render(changed(read_values("cpu-demo"), **changes))
    except helm_python.HelmError as refusal:
        if reason in str(refusal):
            return True
        print(f"refused for another reason: {changes}: {refusal}")
        return False
    print(f"accepted: {changes}")
    return False


def complete_schemas(directory: Path) -> Schemas:
    """Of the CRDs in a directory, with unknown fields refused where the CRD does not keep them."""
    schemas: Schemas = {}
    for path in sorted(directory.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader):
            for version in crd["spec"]["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                kind = crd["spec"]["names"]["kind"]
                schemas[f"{crd['spec']['group']}/{version['name']}", kind] = schema
    return schemas


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: _closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        result["additionalProperties"] = False
    return result


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.helm", description="Records what the chart's tests prove."
    )
    parser.add_argument("--crds", type=Path, help="directory with complete CustomResourceDefinitions")
    parser.add_argument("--dry-run", action="store_true", help="append nothing")
    options = parser.parse_args(arguments)
    schemas = {**SCHEMAS, **complete_schemas(options.crds)} if options.crds else SCHEMAS
    names = [path.name.removesuffix("-values.yaml") for path in VALUES_FILES]
    num_good = sum([is_good(name, schemas) for name in names])
    num_refused = sum([is_refused(changes, reason) for changes, reason in BAD_VALUES])
    print(
        f"{num_good} of {len(names)} values files are good, {num_refused} of {len(BAD_VALUES)} bad values are refused"
    )
    if not options.dry_run:
        tools: dict[str, Parameter] = {
            "helm": helm_python.helm_sdk_version(),
            "kubernetes": KUBERNETES,
            "complete_crds": bool(options.crds),
        }
        append_result("helm", "values_files_ok", num_good, "files", {"files": len(names), **tools})
        append_result("helm", "bad_values_rejected", num_refused, "cases", {"cases": len(BAD_VALUES), **tools})
    return 0 if (num_good, num_refused) == (len(names), len(BAD_VALUES)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
