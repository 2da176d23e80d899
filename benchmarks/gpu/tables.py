"""From measurements to the committed plan table: the admitted plan with the best median ratio per cell."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarks.gpu.shapes import FUSED_LAYERS, LAYERS, Layer
from cluster.engine.kernels.triton.fp8_table import Fp8Entry
from cluster.engine.kernels.triton.plans import AttentionPlan, LinearPlan
from cluster.engine.kernels.triton.table import LinearEntry, PlanTable, file_stem

__all__ = [
    "best_ratios",
    "file_stem",
    "is_tuned",
    "known_plans",
    "make_table",
    "with_plans",
    "with_weights",
    "write_table",
]

Entry = TypeVar("Entry", LinearEntry, Fp8Entry)


def best_ratios(measurements: Path) -> dict[tuple[str, int], tuple[float, LinearPlan]]:
    """(layer, rows) -> (median over rounds of ours / default cuBLAS, plan); later lines of a cell add to it."""
    best: dict[tuple[str, int], tuple[float, LinearPlan]] = {}
    for line in measurements.read_text().splitlines():
        record = json.loads(line)
        ratio = statistics.median(a / b for a, b in zip(record["ms"], record["base_ms"], strict=True))
        cell = (record["layer"], record["num_rows"])
        if cell not in best or ratio < best[cell][0]:
            best[cell] = (ratio, msgspec.convert(record["plan"], LinearPlan))
    return best


def make_table(measurements: Path, device: str, versions: dict[str, str], attention: AttentionPlan) -> PlanTable:
    """Entries in the order of layers and rows."""
    layers = {layer.name: layer for layer in (*LAYERS, *FUSED_LAYERS)}
    plans = {(layers[name], rows): plan for (name, rows), (_, plan) in sorted(best_ratios(measurements).items())}
    entries = with_plans([], plans, LinearEntry)
    return PlanTable(device=device, versions=versions, linear=tuple(entries), attention=attention)


def with_weights(
    entries: Sequence[Entry], layers: Iterable[Layer], defaults: Sequence[tuple[int, Any]], make: Callable[..., Entry]
) -> list[Entry]:  # fmt: skip
    """A table's entries, and the defaults ((rows, plan), ascending) of the layers that it has not: one measured row
    count alone would serve all the others, too."""
    known = {_shape(entry)[0] for entry in entries}
    plans = {(layer, num_rows): plan for layer in layers for num_rows, plan in defaults if _weight(layer) not in known}
    return with_plans(entries, plans, make)


def with_plans(
    entries: Sequence[Entry], plans: Mapping[tuple[Layer, int], Any], make: Callable[..., Entry]
) -> list[Entry]:  # fmt: skip
    """A table's entries, those of these layers and rows with these plans. A row count that the table has not becomes a
    bound of its own. Weights keep their order, row counts of one ascend."""
    merged = {_shape(entry): entry for entry in entries}
    for (layer, num_rows), plan in plans.items():
        out_features, in_features, silu_mul = _weight(layer)
        entry = make(
            out_features=out_features, in_features=in_features, max_rows=num_rows, silu_mul=silu_mul, plan=plan
        )  # fmt: skip
        merged[_shape(entry)] = entry
    weights = list(dict.fromkeys(weight for weight, _ in merged))
    return [merged[shape] for shape in sorted(merged, key=lambda shape: (weights.index(shape[0]), shape[1]))]


def _weight(layer: Layer) -> tuple[int, int, bool]:
    return layer.outputs, layer.in_features, layer.silu_mul


def _shape(entry: LinearEntry | Fp8Entry) -> tuple[tuple[int, int, bool], int]:
    """(weight, rows)."""
    return (entry.out_features, entry.in_features, entry.silu_mul), entry.max_rows


def known_plans(entries: Iterable[LinearEntry], num_rows: int, *, silu_mul: bool) -> list[LinearPlan]:
    """What a table has for some weight and that many rows, and the library; each once."""
    library = () if silu_mul else (LinearPlan(kind="cublaslt"),)
    found = (entry.plan for entry in entries if (entry.max_rows, entry.silu_mul) == (num_rows, silu_mul))
    return list(dict.fromkeys([*found, *library]))


def is_tuned(path: Path, device: str, versions: dict[str, str]) -> bool:
    """Whether the file is a table of that device, made with those versions."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=PlanTable)
    except (FileNotFoundError, msgspec.DecodeError):  # of an older form, too
        return False
    return (table.device, table.versions) == (device, versions) and len(table.linear) > 0


def write_table(table: PlanTable, path: Path) -> None:
    """One entry per line, so that a change reads as one."""
    head = msgspec.structs.replace(table, linear=())
    text = json.dumps(msgspec.to_builtins(head), indent=1)
    lines = ",\n  ".join(json.dumps(msgspec.to_builtins(entry)) for entry in table.linear)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"linear": []', f'"linear": [\n  {lines}\n ]') + "\n")
