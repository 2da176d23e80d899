"""How the experts' kernels are launched for a step: data, which never decides bits."""

from __future__ import annotations

from bisect import bisect_left
from importlib import resources
from typing import Literal

import msgspec

from cluster.engine.kernels.triton.table import file_stem

Kind = Literal["few", "grouped"]  # few: at most a tile of rows in all, nothing is grouped


class GroupedPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """One grouped GEMM. The rows of a tile are the `MoePlan`'s."""

    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 4  # row tiles that share weights in L2, where rows are grouped
    swap: bool = True  # weights on the wide side of the instruction; always so where rows are not grouped
    evict_first: bool = True  # do not keep weights in L2, where they come through pointers
    tma: bool = False  # weights, and the rows of the second GEMM, through the bulk copy engine; grouped only
    persistent: bool = False  # as many programs as multiprocessors; grouped only


class MoePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """Both GEMMs of a step."""

    kind: Kind
    block_m: int  # rows of a tile
    gate_up: GroupedPlan
    down: GroupedPlan


REFERENCE_MOE = MoePlan(
    kind="grouped",
    block_m=64,
    gate_up=GroupedPlan(block_n=32, block_k=64, num_stages=1, swap=False, evict_first=False),
    down=GroupedPlan(block_n=64, block_k=64, num_stages=1, swap=False, evict_first=False),
)


class MoeShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan depends on besides the rows: experts on this rank, experts of a row, sizes."""

    num_experts: int
    top_k: int
    hidden: int
    features: int


class MoeEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fastest plan of a shape for up to `max_rows` rows of a step."""

    shape: MoeShape
    max_rows: int
    plan: MoePlan


class MoeTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All plans measured on one device."""

    device: str
    entries: tuple[MoeEntry, ...] = ()


class MoePlanIndex:
    """Looks plans up; shapes that were not measured take plans by their rows per expert."""

    def __init__(self, table: MoeTable) -> None:
        self._by_shape: dict[MoeShape, list[MoeEntry]] = {}
        for entry in sorted(table.entries, key=lambda entry: entry.max_rows):
            self._by_shape.setdefault(entry.shape, []).append(entry)

    def plan(self, shape: MoeShape, num_rows: int) -> MoePlan:
        """Bounds ascend; the largest one serves all rows above it, if it can."""
        entries = self._by_shape.get(shape, [])
        position = bisect_left(entries, num_rows, key=lambda entry: entry.max_rows)
        plan = entries[min(position, len(entries) - 1)].plan if entries else unmeasured_moe_plan(shape, num_rows)
        is_possible = plan.kind == "grouped" or num_rows <= plan.block_m
        return plan if is_possible else unmeasured_moe_plan(shape, num_rows)


def unmeasured_moe_plan(shape: MoeShape, num_rows: int) -> MoePlan:
    """Runs for any shape."""
    if num_rows <= 32:
        few = GroupedPlan(num_stages=5)
        return MoePlan(kind="few", block_m=16 if num_rows <= 16 else 32, gate_up=few, down=few)
    rows_per_expert = num_rows * shape.top_k / shape.num_experts
    if rows_per_expert <= 48:
        swapped = GroupedPlan(num_stages=4)
        block_m = 16 if rows_per_expert <= 12 else 32 if rows_per_expert <= 24 else 64
        return MoePlan(kind="grouped", block_m=block_m, gate_up=swapped, down=swapped)
    wide = GroupedPlan(block_n=128, block_k=64, num_warps=8, num_stages=3, swap=False, evict_first=False, tma=True)
    return MoePlan(kind="grouped", block_m=128, gate_up=wide, down=wide)


def load_moe_plan_index(device_name: str) -> MoePlanIndex:
    """The committed plans of this device, or defaults that run on any."""
    file = resources.files(__package__) / "tables" / f"{file_stem(device_name)}-moe.json"
    if not file.is_file():
        return MoePlanIndex(MoeTable(device=device_name))
    return MoePlanIndex(msgspec.json.decode(file.read_bytes(), type=MoeTable))
