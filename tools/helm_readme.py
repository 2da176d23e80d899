"""Write helm/tandem/README.md: one row for each value, from the comments in values.yaml (`# -- meaning`).

python tools/helm_readme.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent.parent / "helm" / "tandem"
README = CHART / "README.md"
HEAD = """\
# Helm chart

<!-- Written by `make docs` from values.yaml; edit the comments there. -->

How to install it, and what it does, is in `docs/kubernetes.md`. A key that is not in this table is an error, so is a
value of the wrong type; what cannot work together is refused with the reason.

| key | default | meaning |
|---|---|---|
"""
_KEY = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>.*)")


def rows(text: str) -> Iterator[tuple[str, str, str]]:
    """(key, default as JSON, meaning). Raises `ValueError` for a leaf without a comment."""
    defaults = yaml.safe_load(text)
    path: list[str] = []
    comment = ""
    documented_depth = 0  # keys deeper than it belong to a value that is described as a whole
    for line in text.splitlines():
        if line.strip().startswith("# -- "):
            comment = line.strip().removeprefix("# -- ")
        key = _KEY.fullmatch(line)
        if key is None:
            continue
        depth = len(key["indent"]) // 2
        path[depth:] = [key["name"]]
        if documented_depth and depth >= documented_depth:
            continue
        documented_depth = 0
        value = key["value"].strip()
        if value.startswith("*"):
            yield f"{'.'.join(path)}.*", "", f"The same keys as those of `{_anchored(text, value[1:])}`."
        elif comment:
            yield ".".join(path), f"`{json.dumps(_at(defaults, path))}`", comment
            documented_depth = depth + 1
            comment = ""
        elif value and not value.startswith("&"):
            raise ValueError(f"values.yaml: {'.'.join(path)} has no comment")


def _anchored(text: str, anchor: str) -> str:
    [name] = re.findall(rf"^(\w+): &{anchor}$", text, re.MULTILINE)
    return str(name)


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def main() -> int:
    text = (CHART / "values.yaml").read_text()
    lines = [f"| `{key}` | {default} | {meaning} |\n" for key, default, meaning in rows(text)]
    page = HEAD + "".join(lines)
    if "--check" not in sys.argv:
        README.write_text(page)
        return 0
    if not README.exists() or README.read_text() != page:
        sys.stderr.write(f"{README} is not what values.yaml says: run `make docs`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
