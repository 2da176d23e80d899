"""Measuring the experts of one layer: each GEMM plan, the whole layer, torch's grouped GEMM, the floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from benchmarks.gpu.moe_candidates import gemm_plans, tilings
from benchmarks.gpu.moe_inputs import MoeInputs
from benchmarks.gpu.timing import graph_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.cuda_weights import CudaExpertWeight, CudaLinearWeight
from cluster.engine.kernels.triton import moe_launch
from cluster.engine.kernels.triton.moe_plans import GroupedPlan, Kind, MoePlan, MoeShape

PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200
NUM_CHOICES = 4  # taking turns, so that few rows do not find their experts in L2
CANNOT_RUN = (triton.OutOfResources, triton.CompilationError, RuntimeError)
Call = Callable[[], object]


def short(plan: GroupedPlan) -> str:
    """As in 128x64x4w8:tp, columns x K x stages, warps; t TMA, p persistent, s weights on the wide side."""
    flags = "t" * plan.tma + "p" * plan.persistent + "s" * plan.swap
    return f"{plan.block_n}x{plan.block_k}x{plan.num_stages}w{plan.num_warps}:{flags}"


class Tiling(NamedTuple):
    """The best plan of one tiling; `place_ms` is what grouping costs."""

    plan: MoePlan
    gate_up_ms: float
    down_ms: float
    place_ms: float

    @property
    def ms(self) -> float:
        return self.gate_up_ms + self.down_ms + self.place_ms


class Step:
    """Some rows with each of a few choices of experts, and room for what the GEMMs of a tiling make of them."""

    def __init__(self, inputs: MoeInputs, kind: Kind, block_m: int, choices: list[torch.Tensor]) -> None:
        shape = self.shape = inputs.shape
        programs = torch.cuda.get_device_properties(0).multi_processor_count
        num_rows = len(choices[0])
        self.kind, self.block_m, self.choices = kind, block_m, choices
        self.runs: list[Callable[..., None]] = []
        places = num_rows * shape.top_k
        for choice in choices:
            if kind == "few":
                self.runs.append(moe_launch.FewCall(choice, 0, block_m, False).run)
                continue
            grouping = moe_launch.run_grouping(choice, shape.num_experts, 0, block_m)
            self.runs.append(moe_launch.GroupedCall(grouping, shape.top_k, block_m, programs, False).run)
            places = len(grouping.order)
        active = torch.zeros((places, shape.features), device="cuda", dtype=torch.bfloat16)
        rows = torch.empty((num_rows * shape.top_k, shape.hidden), device="cuda", dtype=torch.bfloat16)
        self._gate_up = (inputs.x[:num_rows].contiguous(), inputs.gate_up, active)
        self._down = (active, inputs.down, rows)

    def gemm(self, plan: GroupedPlan, *, silu_mul: bool) -> list[Call]:
        operands = self._gate_up if silu_mul else self._down

        def call(run: Callable[..., None]) -> Call:
            return lambda: run(*operands, plan, silu_mul=silu_mul)

        return [call(run) for run in self.runs]

    def plans(self, *, silu_mul: bool) -> list[GroupedPlan]:
        in_features = self.shape.hidden if silu_mul else self.shape.features
        return gemm_plans(self.kind, self.block_m, in_features, silu_mul=silu_mul)

    def grouping(self) -> list[Call]:
        def call(choice: torch.Tensor) -> Call:
            return lambda: moe_launch.run_grouping(choice, self.shape.num_experts, 0, self.block_m)

        return [call(choice) for choice in self.choices]


class MoeBench:
    """One layer, and choices of experts for as many rows as are asked for. `failed` says what could not run."""

    def __init__(self, shape: MoeShape, max_rows: int) -> None:
        self.shape = shape
        self.ops = CudaOps(torch.device("cuda"))
        self.inputs = MoeInputs(shape, max_rows)
        generator = torch.Generator(device="cuda").manual_seed(1)
        self.choices = [self.inputs.choice(max_rows, generator) for _ in range(NUM_CHOICES)]
        router = torch.randn((shape.num_experts, shape.hidden), device="cuda") * shape.hidden**-0.5
        self.router = CudaLinearWeight(router.bfloat16())
        self.failed: list[str] = []

    def step(self, kind: Kind, block_m: int, num_rows: int) -> Step:
        return Step(self.inputs, kind, block_m, [choice[:num_rows].contiguous() for choice in self.choices])

    def best_tiling(self, num_rows: int, deadline: float) -> Tiling | None:
        """The fastest plans; after the deadline (of time.monotonic()) the first that run. None: none runs."""
        best: Tiling | None = None
        for kind, block_m in tilings(self.shape, num_rows):
            if best is not None and time.monotonic() > deadline:
                break
            step = self.step(kind, block_m, num_rows)
            gate_up, down = (self._best_gemm(step, silu_mul=silu_mul, deadline=deadline) for silu_mul in (True, False))
            if gate_up is None or down is None:
                continue
            place_ms = graph_ms(step.grouping(), min_ms=1.0, replays=3) if kind == "grouped" else 0.0
            plan = MoePlan(kind=kind, block_m=block_m, gate_up=gate_up[1], down=down[1])
            found = Tiling(plan, gate_up[0], down[0], place_ms)
            best = found if best is None or found.ms < best.ms else best
        return best

    def _best_gemm(self, step: Step, *, silu_mul: bool, deadline: float) -> tuple[float, GroupedPlan] | None:
        best: tuple[float, GroupedPlan] | None = None
        for plan in step.plans(silu_mul=silu_mul):
            if best is not None and time.monotonic() > deadline:
                break
            try:
                ms = graph_ms(step.gemm(plan, silu_mul=silu_mul), min_ms=1.5, replays=3)
            except CANNOT_RUN as error:
                self._fail(f"{step.kind} {step.block_m} {short(plan)}", error)
                continue
            best = (ms, plan) if best is None or ms < best[0] else best
        return best

    def _fail(self, what: str, error: Exception) -> None:
        self.failed.append(f"{what}: {type(error).__name__}: {str(error)[:90]}")

    def differing(self, plan: MoePlan, num_rows: int) -> int:
        """Accumulators that differ from those of the plain GEMM, on inputs that reveal an order."""
        count = min(num_rows, 2048)
        x, experts = self.inputs.x[:count], self.inputs.experts[:count]
        wanted = self.inputs.through_linear(x, experts)
        out = moe_launch.run_experts(
            x, experts, self.inputs.gate_up, self.inputs.down, plan, num_programs=132, out_dtype=torch.float32
        )
        return int((out.view(torch.int32) != wanted.view(torch.int32)).sum())

    def layer_ms(self, plan: MoePlan, num_rows: int) -> tuple[float, float]:
        """The layer as the model runs it, and without its GEMMs: router, choice, combination."""
        ops, shape = self.ops, self.shape
        gate_up, down = CudaExpertWeight(self.inputs.gate_up), CudaExpertWeight(self.inputs.down)
        rows = torch.zeros((num_rows, shape.top_k, shape.hidden), device="cuda", dtype=torch.bfloat16)

        def layer(x: torch.Tensor, with_experts: bool) -> torch.Tensor:
            logits = ops.linear(x, self.router, out_dtype=torch.float32)
            choice = ops.moe_route(logits, shape.top_k, renormalise=True)
            made = ops.moe_experts(x, choice.experts_TJ, gate_up, down, plan=plan) if with_experts else rows
            return ops.moe_combine(made, choice.weights_TJ)

        whole = graph_ms(self._on_random_rows(lambda x: layer(x, True), num_rows), min_ms=3.0, replays=3)
        return whole, graph_ms(self._on_random_rows(lambda x: layer(x, False), num_rows), min_ms=1.0, replays=3)

    def torch_ms(self, num_rows: int) -> float:
        """The same layer by torch: sort, gather, grouped GEMMs, SwiGLU, weighted sum. NaN if it cannot run."""
        shape = self.shape
        gate_up, down = self.inputs.gate_up.transpose(1, 2), self.inputs.down.transpose(1, 2)
        every = torch.arange(shape.num_experts, device="cuda", dtype=torch.int32)

        def layer(x: torch.Tensor) -> torch.Tensor:
            weights, experts = torch.mm(x, self.router.weight_NK.t()).float().softmax(-1).topk(shape.top_k)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            ordered, order = experts.flatten().int().sort()
            ends = torch.searchsorted(ordered, every, right=True, out_int32=True)
            gate, up = torch._grouped_mm(x[order // shape.top_k], gate_up, offs=ends).chunk(2, dim=1)
            rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down, offs=ends)
            back = torch.empty_like(rows).index_copy_(0, order, rows).view(num_rows, shape.top_k, -1)
            return (back * weights.bfloat16()[:, :, None]).sum(dim=1)

        try:
            return graph_ms(self._on_random_rows(layer, num_rows), min_ms=3.0, replays=3)
        except CANNOT_RUN as error:
            self._fail(f"torch at {num_rows} rows", error)
            return float("nan")

    def _on_random_rows(self, layer: Callable[[torch.Tensor], torch.Tensor], num_rows: int) -> list[Call]:
        """The router's choice differs from call to call as its inputs do."""

        def call() -> Call:
            x = torch.randn((num_rows, self.shape.hidden), device="cuda").bfloat16()
            return lambda: layer(x)

        return [call() for _ in range(NUM_CHOICES)]

    def library_down(self, num_rows: int) -> str:
        """Could torch's grouped GEMM serve the second GEMM? Its bits, and its time on rows sorted before.

        It cannot serve the first one: it rounds gate and up before they are multiplied.
        """
        shape = self.shape
        active = torch.randn((num_rows * shape.top_k, shape.features), device="cuda").bfloat16()
        counts = self.inputs.experts[:num_rows].flatten().bincount(minlength=shape.num_experts)
        ends, down = counts.cumsum(0).int(), self.inputs.down.transpose(1, 2)
        try:
            ours = torch._grouped_mm(active, down, offs=ends)
            ms = graph_ms([lambda: torch._grouped_mm(active, down, offs=ends)], min_ms=2.0, replays=3)
        except CANNOT_RUN as error:
            return f"torch._grouped_mm: {type(error).__name__}: {str(error)[:90]}"
        parts = zip(active.split(counts.tolist()), self.inputs.down, strict=True)
        wanted = torch.cat([self.ops.linear(part, CudaLinearWeight(weight)) for part, weight in parts])
        differing = int((ours.view(torch.int16) != wanted.view(torch.int16)).sum())
        return f"torch._grouped_mm as down, {num_rows} rows sorted before: {1e3 * ms:.1f} us, {differing} bits differ"

    def floor_ms(self, num_rows: int, copy_tb_s: float) -> float:
        """What must be read and written over copy bandwidth, or the arithmetic at its peak, whichever is more."""
        shape = self.shape
        touched = sum(len(choice[:num_rows].unique()) for choice in self.choices) / NUM_CHOICES
        pairs = num_rows * shape.top_k
        elements = touched * 3 * shape.hidden * shape.features
        elements += 2 * num_rows * shape.hidden + pairs * (2 * shape.features + 2 * shape.hidden)
        flops = 6 * pairs * shape.hidden * shape.features
        return max(2 * elements / copy_tb_s / 1e9, flops / PEAK_TFLOPS / 1e9)
