"""FP8 launch plans per device and shape class, measured once and kept as data beside the code.

Shape class: (local N, K, rows up to a bound, epilogue), as in `table.py`; FP8 has a file of its own,
because it is tuned by a command of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import msgspec

from cluster.engine.kernels.triton.fp8_plans import UNMEASURED_FP8, Fp8Plan, unmeasured_plan
from cluster.engine.kernels.triton.table import find_table, library_versions


class Fp8Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fastest admitted plan of one weight for up to `max_rows` rows. N counts outputs, K inputs.

    `otherwise` serves what a library does not take: a bias, fp32 results, block scales.
    """

    out_features: int
    in_features: int
    max_rows: int
    silu_mul: bool = False
    plan: Fp8Plan
    otherwise: Fp8Plan | None = None

    @property
    def own_plan(self) -> Fp8Plan:
        """The fastest one of ours."""
        return self.plan if self.plan.kind != "library" else self.otherwise or unmeasured_plan(self.max_rows)


class Fp8Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All FP8 plans measured on one device, per-channel scales."""

    device: str
    versions: dict[str, str] = {}
    linear: tuple[Fp8Entry, ...] = ()


class Fp8PlanIndex:
    """Looks plans up. A weight that was never measured takes the plans of the measured one nearest in size."""

    def __init__(self, table: Fp8Table) -> None:
        self._by_shape: dict[tuple[int, int, bool], list[Fp8Entry]] = defaultdict(list)
        for entry in sorted(table.linear, key=lambda entry: entry.max_rows):
            self._by_shape[entry.out_features, entry.in_features, entry.silu_mul].append(entry)
        self._nearest: dict[tuple[int, int, bool], list[Fp8Entry]] = {}

    def entries(self) -> list[Fp8Entry]:
        """Every measured plan."""
        return [entry for entries in self._by_shape.values() for entry in entries]

    def linear(
        self, out_features: int, in_features: int, num_rows: int, *, silu_mul: bool, takes_library: bool = True
    ) -> Fp8Plan:
        """Bounds ascend; the largest one serves all rows above it."""
        key = (out_features, in_features, silu_mul)
        entries = self._by_shape.get(key, self._nearest.get(key))
        if entries is None:
            entries = self._nearest[key] = self._plans_of_nearest(key)
        position = bisect_left(entries, num_rows, key=lambda entry: entry.max_rows)
        entry = entries[min(position, len(entries) - 1)]
        return entry.plan if takes_library else entry.own_plan

    def _plans_of_nearest(self, key: tuple[int, int, bool]) -> list[Fp8Entry]:
        out_features, in_features, silu_mul = key
        known = [shape for shape in self._by_shape if shape[2] == silu_mul]
        if known:  # a library picks its algorithm by shape, so it is admitted for no other
            nearest = min(known, key=lambda s: abs(s[0] / out_features - 1) + abs(s[1] / in_features - 1))
            return [_without_library(entry) for entry in self._by_shape[nearest]]
        return [
            Fp8Entry(out_features=out_features, in_features=in_features, max_rows=rows, silu_mul=silu_mul, plan=plan)
            for rows, plan in UNMEASURED_FP8
        ]


def load_fp8_plans(device_name: str) -> Fp8PlanIndex:
    """The committed plans of this device, or defaults that run on any. Speed differs, bits do not."""
    found = find_table(device_name, "_fp8")
    if found is None:
        return Fp8PlanIndex(Fp8Table(device=device_name))
    table = msgspec.json.decode(found, type=Fp8Table)
    if table.versions != library_versions():
        table = msgspec.structs.replace(table, linear=tuple(_without_library(entry) for entry in table.linear))
    return Fp8PlanIndex(table)


def _without_library(entry: Fp8Entry) -> Fp8Entry:
    return msgspec.structs.replace(entry, plan=entry.own_plan)
