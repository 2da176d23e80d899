"""What `tune_step.py` tries and keeps: plans of bf16 products or of FP8 ones, and the table they are of."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, get_args

import torch

from benchmarks.gpu import fp8, fp8_candidates, fp8_vet, sustained, sweeps, tables
from benchmarks.gpu.fp8_layers import LAYERS as FP8_LAYERS
from benchmarks.gpu.gemm import LayerBench
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.fp8_plans import UNMEASURED_FP8, Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8PlanIndex, Fp8Table
from cluster.engine.kernels.triton.plans import LinearKind, LinearPlan
from cluster.engine.kernels.triton.table import UNMEASURED, LinearEntry, PlanIndex, PlanTable, library_versions

Plan = TypeVar("Plan")
BF16_LAYERS = ("8b.gate_up_silu", "8b.down", "8b.qkv", "8b.o", "8b.lm_head")


class StepPlans(Protocol[Plan]):
    """The plans of a device's table, one of which may give way to another for as long as it is tried."""

    def prepare(self, row_counts: Sequence[int], kinds: Collection[str]) -> None:
        """Compile what `offered` may name, or more, in processes of its own."""

    def offered(self, layer: str, num_rows: int, kinds: Collection[str]) -> list[Plan]:
        """The plan that serves first, then those of these kinds that were found to have the reference's bits."""

    def serve(self, layer: str, num_rows: int, plan: Plan) -> None:
        """In the next steps that are launched or captured."""

    def keep(self, layer: str, num_rows: int, plan: Plan) -> None:
        """In the table."""

    def write(self, path: Path) -> None:
        """The table with what was kept."""


class Bf16Plans:
    """`StepPlans` of `CudaOps.plans`."""

    layers, kinds = BF16_LAYERS, get_args(LinearKind)

    def __init__(self, ops: CudaOps) -> None:
        self._ops = ops
        layers = [sustained.ALL_LAYERS[name] for name in self.layers]
        self._entries = tables.with_weights(ops.plans.entries(), layers, UNMEASURED, LinearEntry)

    def prepare(self, row_counts: Sequence[int], kinds: Collection[str]) -> None:
        sweeps.compile_all(max(1, (os.cpu_count() or 1) // 2), row_counts)

    def offered(self, layer: str, num_rows: int, kinds: Collection[str]) -> list[LinearPlan]:
        """`RuntimeError` if the table's plan has other bits: another one serves, there is nothing to compare with."""
        shape = sustained.ALL_LAYERS[layer]
        mine, *others = sustained.plans_for(self._ops, shape, num_rows)
        wanted = [mine, *(plan for plan in others if plan.kind in kinds)]
        sound = sustained.sound_plans(LayerBench(self._ops, shape, num_rows), wanted, num_rows)
        if sound[:1] != [mine]:
            raise RuntimeError(f"{layer}, {num_rows} rows: the table's plan is not sound; tune_rows finds another")
        return sound

    def serve(self, layer: str, num_rows: int, plan: LinearPlan) -> None:
        self._ops.plans = PlanIndex(self._table(self._with(layer, num_rows, plan)))

    def keep(self, layer: str, num_rows: int, plan: LinearPlan) -> None:
        self._entries = self._with(layer, num_rows, plan)

    def write(self, path: Path) -> None:
        tables.write_table(self._table(self._entries), path)

    def _with(self, layer: str, num_rows: int, plan: LinearPlan) -> list[LinearEntry]:
        return tables.with_plans(self._entries, {(sustained.ALL_LAYERS[layer], num_rows): plan}, LinearEntry)

    def _table(self, entries: Sequence[LinearEntry]) -> PlanTable:
        return PlanTable(
            device=torch.cuda.get_device_name(), versions=library_versions(), attention=self._ops.plans.attention,
            linear=tuple(entries),
        )  # fmt: skip


class Fp8Plans:
    """`StepPlans` of `CudaOps.fp8.plans`, of channel scales."""

    layers = tuple(name for name in BF16_LAYERS if name != "8b.lm_head")
    kinds = ("chain", "tma", "rings", "stream")  # of `fp8_candidates`

    def __init__(self, ops: CudaOps) -> None:
        self._fp8 = ops.fp8
        self._shapes = {layer.name: layer for layer in FP8_LAYERS if layer.name in self.layers}
        self._entries = tables.with_weights(ops.fp8.plans.entries(), self._shapes.values(), UNMEASURED_FP8, Fp8Entry)
        self._sound: set[fp8_vet.Job] = set()

    def prepare(self, row_counts: Sequence[int], kinds: Collection[str]) -> None:
        """Tries them, too: one that hangs takes its process alone. Tells which are left out."""
        wanted = {
            (silu_mul, plan)
            for num_rows in row_counts
            for silu_mul in (False, True)
            for plan in fp8_candidates.candidates(num_rows, silu_mul=silu_mul)
            if plan.kind in kinds
        }
        verdicts = fp8_vet.vet(max(2, min(14, (os.cpu_count() or 2) // 2)), 120.0, wanted.__contains__)
        self._sound = fp8.sound_jobs(verdicts)
        print(f"{len(self._sound)} of {len(wanted)} plans tried and sound", flush=True)

    def offered(self, layer: str, num_rows: int, kinds: Collection[str]) -> list[Fp8Plan]:
        shape = self._shapes[layer]
        mine = self._fp8.plans.linear(
            shape.outputs, shape.in_features, num_rows, silu_mul=shape.silu_mul, takes_library=False
        )  # fmt: skip
        others = fp8_candidates.candidates(num_rows, silu_mul=shape.silu_mul)
        sound = [plan for plan in others if plan.kind in kinds and (shape.silu_mul, plan) in self._sound]
        return list(dict.fromkeys([mine, *sound]))

    def serve(self, layer: str, num_rows: int, plan: Fp8Plan) -> None:
        entries = tuple(self._with(layer, num_rows, plan))
        device = torch.cuda.get_device_name()
        self._fp8.plans = Fp8PlanIndex(Fp8Table(device=device, versions=library_versions(), linear=entries))

    def keep(self, layer: str, num_rows: int, plan: Fp8Plan) -> None:
        self._entries = self._with(layer, num_rows, plan)

    def write(self, path: Path) -> None:
        fp8.write_table(self._entries, path)

    def _with(self, layer: str, num_rows: int, plan: Fp8Plan) -> list[Fp8Entry]:
        return tables.with_plans(self._entries, {(self._shapes[layer], num_rows): plan}, Fp8Entry)
