"""Writes the reference of all configuration keys from the structs and the comments in their source:
`python -m cluster.config_reference > docs/config.md`. A test keeps the file up to date.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import msgspec

from cluster.config import (
    ClusterConfig,
    ConnectorSettings,
    LaunchSettings,
    LoggingSettings,
    ModelSettings,
    PoolSettings,
    RaySettings,
    RouterSettings,
    SecuritySettings,
)
from cluster.config_source import field_types, is_section, type_name
from cluster.engine.config import EngineConfig, SpeculationConfig

SECTIONS: tuple[tuple[str, type[msgspec.Struct]], ...] = (
    ("Top level", ClusterConfig),
    ("`model`", ModelSettings),
    ("`router`", RouterSettings),
    ("`prefill` and `decode`", PoolSettings),
    ("`prefill.engine` and `decode.engine`", EngineConfig),
    ("`decode.engine.speculation`", SpeculationConfig),
    ("`connector`", ConnectorSettings),
    ("`security`", SecuritySettings),
    ("`logging`", LoggingSettings),
    ("`launch`", LaunchSettings),
    ("`launch.ray`", RaySettings),
)

INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from cluster/config.py; edit the comments there. -->

A deployment is described in a YAML file, `cluster launch cluster.yaml`. Every key has a default, so an empty
file serves the demo model. Later sources win:

1. the defaults below
2. the file
3. the environment: `TANDEM_` and the key with two underscores between its levels, `TANDEM_ROUTER__PORT=9000`
4. flags: `--set router.port=9000`, and the short ones of `cluster launch --help`

A key that does not exist, a wrong type or a value out of range is an error that names the key. Sizes (`…_bytes`)
may be written with a unit: `512MiB`, `2GiB`, `1.5GB`. `cluster plan cluster.yaml` shows what a file means
without starting anything.

```yaml
model:
  path: demo
router:
  port: 8000
prefill:
  replicas: 1
decode:
  replicas: 2
  engine:
    kv_cache_bytes: 1GiB
```
"""


def render() -> str:
    parts = [INTRODUCTION]
    for title, section in SECTIONS:
        parts.append(f"\n## {title}\n\n{_summary(section)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        comments = field_comments(section)
        for field in msgspec.structs.fields(section):
            cells = [f"`{field.name}`", _type(field.type), _default(field), comments[field.name]]
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def field_comments(section: type[msgspec.Struct]) -> dict[str, str]:
    """The comment behind each field; a test sees to it that each field has one."""
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.splitlines()
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    comments = dict.fromkeys(field_types(section), "")
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert statement.end_lineno is not None
            _, marker, comment = lines[statement.end_lineno - 1][statement.end_col_offset :].partition("#")
            if marker:
                comments[statement.target.id] = comment.strip()
    return comments


def _summary(section: type[msgspec.Struct]) -> str:
    return inspect.cleandoc(section.__doc__ or "").split("\n\n", 1)[0].replace("\n", " ")


def _type(annotation: Any) -> str:
    return "section" if is_section(annotation) else type_name(annotation)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if is_section(field.type):
        return ""
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(render())
