"""From YAML, environment variables and flags to one checked tree of plain values.

The checks follow the annotations of the config structs; this module knows none of them by name.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import msgspec
import yaml

from cluster.errors import ConfigError
from cluster.sizes import parse_size

MAX_FILE_BYTES = 1 << 20
ENVIRONMENT_PREFIX = "TANDEM_"
LEVEL_SEPARATOR = "__"  # names without it, such as TANDEM_CACHE, are not configuration

Tree = dict[str, Any]
Text = tuple[str, str, str]  # where it comes from (for the message), dotted key, value as text


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                first = seen[key_node.value]
                raise ConfigError(f"key {key_node.value!r} is given twice, in line {first} and in line {line}")
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Tree:
    """The mapping in the file; `ConfigError` when there is no file, no YAML or no mapping in it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes; is it a config file?")
    try:
        document = yaml.load(content, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # undecodable bytes, bad dates, endless nesting
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with keys such as `model:`, got {_shown(document)}")
    return document


def environment_texts(environment: Mapping[str, str]) -> list[Text]:
    return [
        (f"environment variable {name}", ".".join(name[len(ENVIRONMENT_PREFIX) :].lower().split(LEVEL_SEPARATOR)), text)
        for name, text in sorted(environment.items())
        if name.startswith(ENVIRONMENT_PREFIX) and LEVEL_SEPARATOR in name
    ]


def check_tree(root: type[msgspec.Struct], document: Mapping[Any, Any], origin: str) -> Tree:
    """A copy of `document` with sizes as numbers; every unknown key and wrong type in one `ConfigError`."""
    problems: list[str] = []
    tree = _check_level(root, root, document, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{origin}: {problem}" for problem in problems))
    return tree


def _check_level(
    root: type[msgspec.Struct], level: type[msgspec.Struct], given: Mapping[Any, Any], prefix: str, problems: list[str]
) -> Tree:
    annotations = field_types(level)
    tree: Tree = {}
    for key, value in given.items():
        path = f"{prefix}{key}"
        if key not in annotations:
            problems.append(_unknown_key(root, path, str(key), prefix, annotations))
            continue
        annotation = annotations[key]
        if is_section(annotation):
            if isinstance(value, Mapping):
                tree[key] = _check_level(root, annotation, value, f"{path}.", problems)
            elif value is not None:  # `router:` with nothing below it means the defaults
                problems.append(
                    f"{path}: expected a mapping with keys such as {_some_keys(annotation)}, got {_shown(value)}"
                )
            continue
        try:
            tree[key] = _leaf(path, annotation, value, is_text=False)
        except ConfigError as error:
            problems.append(error.message)
    return tree


def apply_texts(root: type[msgspec.Struct], tree: Tree, texts: Sequence[Text]) -> Tree:
    """`tree` with the texts put in, each converted to the type of its key."""
    for origin, dotted, text in texts:
        try:
            _apply_text(root, tree, dotted, text)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error.message}") from error
    return tree


def _apply_text(root: type[msgspec.Struct], tree: Tree, dotted: str, text: str) -> None:
    level, branch, prefix = root, tree, ""
    *parents, leaf = dotted.split(".")
    for parent in parents:
        annotation = field_types(level).get(parent)
        if not is_section(annotation):
            raise ConfigError(_unknown_key(root, f"{prefix}{parent}", parent, prefix, field_types(level)))
        level, branch, prefix = annotation, branch.setdefault(parent, {}), f"{prefix}{parent}."
    annotations = field_types(level)
    if leaf not in annotations:
        raise ConfigError(_unknown_key(root, dotted, leaf, prefix, annotations))
    if is_section(annotations[leaf]):
        raise ConfigError(
            f"{dotted} is a section; set one of its keys, such as {dotted}.{_first_key(annotations[leaf])}"
        )
    branch[leaf] = _leaf(dotted, annotations[leaf], text, is_text=True)


def _leaf(path: str, annotation: Any, value: Any, is_text: bool) -> Any:
    if path.endswith("_bytes") and isinstance(value, str) and (size := parse_size(value)) is not None:
        return size
    if is_text and value == "null" and type(None) in get_args(annotation):
        return None
    if is_text and get_origin(annotation) is dict:
        value = _pairs(path, value)
    try:
        return msgspec.convert(value, annotation, strict=not is_text)
    except msgspec.ValidationError:
        raise ConfigError(f"{path}: expected {type_name(annotation)}, got {_shown(value)}") from None


def _pairs(path: str, text: str) -> dict[str, str]:
    """Of `pool=decode,zone=a`."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"{path}: expected NAME=VALUE,NAME=VALUE, got {_shown(text)}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _unknown_key(root: type[msgspec.Struct], path: str, key: str, prefix: str, annotations: Mapping[str, Any]) -> str:
    if close := difflib.get_close_matches(key, annotations, n=1, cutoff=0.6):
        return f"{path}: unknown key; did you mean {prefix}{close[0]}?"
    elsewhere = [known for known in all_paths(root) if known.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"{path}: unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"{path}: unknown key; known here: {', '.join(annotations)}"


def all_paths(level: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for name, annotation in field_types(level).items():
        yield f"{prefix}{name}"
        if is_section(annotation):
            yield from all_paths(annotation, f"{prefix}{name}.")


def field_types(level: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(level)}


def is_section(annotation: Any) -> TypeGuard[type[msgspec.Struct]]:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def type_name(annotation: Any) -> str:
    """As a user would say it: `int or null`, `"nixl" or "loopback"`."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        return "a mapping"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in get_args(annotation))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {str: "text", int: "whole number", float: "number", bool: "truth value", list: "list", dict: "mapping"}
    shown = repr(value)
    return f"{shown[:60]}{'…' if len(shown) > 60 else ''} (a {kinds.get(type(value), type(value).__name__)})"


def _some_keys(section: type[msgspec.Struct]) -> str:
    return ", ".join(f"`{name}`" for name in _take(field_types(section), 3))


def _first_key(section: type[msgspec.Struct]) -> str:
    return _take(field_types(section), 1)[0]


def _take(names: Iterable[str], count: int) -> list[str]:
    return list(names)[:count]
