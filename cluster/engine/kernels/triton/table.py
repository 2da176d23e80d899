"""Launch plans per device and shape class, measured once and kept as data beside the code.

Shape class: (local N, K, rows up to a bound, epilogue). Bits do not depend on it, so a shard may use
another plan than the whole weight does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from importlib import resources

import msgspec
import torch
import triton

from cluster.engine.kernels.triton.plans import AttentionPlan, LinearPlan


class LinearEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fastest admitted plan of one weight for up to `max_rows` rows. N counts outputs, K inputs."""

    out_features: int
    in_features: int
    max_rows: int
    silu_mul: bool = False
    plan: LinearPlan


class PlanTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All plans measured on one device."""

    device: str
    versions: dict[str, str] = {}
    linear: tuple[LinearEntry, ...] = ()
    attention: AttentionPlan = AttentionPlan()


class PlanIndex:
    """Looks plans up. A weight that was never measured takes the plans of the measured one nearest in size."""

    def __init__(self, table: PlanTable) -> None:
        self.attention = table.attention
        self._by_shape: dict[tuple[int, int, bool], list[LinearEntry]] = {}
        for entry in sorted(table.linear, key=lambda entry: entry.max_rows):
            self._by_shape.setdefault((entry.out_features, entry.in_features, entry.silu_mul), []).append(entry)

    def entries(self) -> list[LinearEntry]:
        """Every plan that may serve, those of unmeasured weights seen so far included."""
        return [entry for entries in self._by_shape.values() for entry in entries]

    def linear(self, out_features: int, in_features: int, num_rows: int, *, silu_mul: bool) -> LinearPlan:
        """Bounds ascend; the largest one serves all rows above it."""
        key = (out_features, in_features, silu_mul)
        if key not in self._by_shape:
            self._by_shape[key] = self._nearest(key)
        entries = self._by_shape[key]
        position = bisect_left(entries, num_rows, key=lambda entry: entry.max_rows)
        return entries[min(position, len(entries) - 1)].plan

    def _nearest(self, key: tuple[int, int, bool]) -> list[LinearEntry]:
        out_features, in_features, silu_mul = key

        def distance(other: tuple[int, int, bool]) -> float:
            return abs(other[0] / out_features - 1) + abs(other[1] / in_features - 1)

        known = [shape for shape in self._by_shape if shape[2] == silu_mul]
        if known:
            return self._by_shape[min(known, key=distance)]
        return [
            LinearEntry(out_features=0, in_features=0, max_rows=rows, silu_mul=silu_mul, plan=plan)
            for rows, plan in UNMEASURED
        ]


UNMEASURED: tuple[tuple[int, LinearPlan], ...] = (
    (16, LinearPlan(block_m=16, block_n=64, block_k=128, num_stages=5, swap=True, evict_first=True)),
    (32, LinearPlan(block_m=32, block_n=64, block_k=128, num_stages=5, swap=True, evict_first=True)),
    (64, LinearPlan(block_m=64, block_n=64, block_k=128, num_stages=4, swap=True, evict_first=True)),
    (1 << 30, LinearPlan(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)),
)


def unmeasured_plan(num_rows: int) -> LinearPlan:
    """A Triton chain that runs for any shape and epilogue."""
    return next(plan for max_rows, plan in UNMEASURED if num_rows <= max_rows)


WITHOUT_LIBRARY: tuple[tuple[int, LinearPlan], ...] = (
    *UNMEASURED[:2],  # few rows: a chain that reads the weight once is as good as any
    (128, LinearPlan(kind="tma", block_m=64, block_n=64, block_k=128, num_stages=6, persistent=False)),
    (256, LinearPlan(kind="tma", block_m=128, block_n=64, block_k=128, num_stages=4, persistent=False)),
    (512, LinearPlan(kind="tma", block_m=128, block_n=128, num_warps=8, num_stages=4, persistent=False)),
    (1 << 30, LinearPlan(kind="hopper", block_m=128, block_n=256, num_stages=4, group_m=16, store_parts=2)),
)


def plan_without_library(num_rows: int) -> LinearPlan:
    """What serves where a table names the library and it may not. On an H200: 2 to 7 % slower from 1,024 rows on, up to
    a quarter below."""
    return next(plan for max_rows, plan in WITHOUT_LIBRARY if num_rows <= max_rows)


def library_versions() -> dict[str, str]:
    """What, besides the device, may change a kernel's bits or speed."""
    return {"torch": str(torch.__version__), "triton": str(triton.__version__)}


def file_stem(device_name: str) -> str:
    """As in "NVIDIA H200" -> "NVIDIA_H200"."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name)


def load_plan_index(device_name: str) -> PlanIndex:
    """The committed plans of this device, else those of one with the same multiprocessors, else defaults that
    run on any. Speed differs, bits do not: a plan is tried on this machine before it serves (`plan_admission.py`).
    """
    found = find_table(device_name, "")
    return PlanIndex(PlanTable(device=device_name) if found is None else msgspec.json.decode(found, type=PlanTable))


_SAME_MULTIPROCESSORS = (("NVIDIA H200", "NVIDIA H100 80GB HBM3"),)


def find_table(device_name: str, suffix: str) -> bytes | None:
    """The committed table of a device, or of one with the same multiprocessors. `suffix` names the kind."""
    alike = [name for names in _SAME_MULTIPROCESSORS if device_name in names for name in names]
    for name in (device_name, *alike):
        file = resources.files(__package__) / "tables" / f"{file_stem(name)}{suffix}.json"
        if file.is_file():
            return file.read_bytes()
    return None
