"""GEMMs of the engine against default cuBLAS: which plans keep the bits, and which is fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.shapes import Layer
from benchmarks.gpu.timing import graph_ms, interleaved_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton.plans import REFERENCE_LINEAR, LinearPlan

_COLD_BYTES = 300 << 20  # rotate over this much weight, several times the L2


class Measurement(NamedTuple):
    layer: str
    num_rows: int
    plan: LinearPlan | None  # None: default cuBLAS, split-K allowed
    milliseconds: float
    differing: int  # elements whose bits differ from the reference
    error: str = ""


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * F + offs, mask=offs < F).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + offs, mask=offs < F).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + offs, y.to(tl.bfloat16), mask=offs < F)


def run_silu_mul(gate_up_TF: torch.Tensor, out_TF: torch.Tensor) -> None:
    """silu(gate) * up as a kernel of its own, for products that do not fuse it."""
    num_rows, features = out_TF.shape
    _silu_mul_kernel[(triton.cdiv(features, 1024), num_rows)](gate_up_TF, out_TF, features, BLOCK=1024)


def use_default_cublas() -> None:
    torch.backends.cuda.preferred_blas_library("default")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def use_admitted_cublas() -> None:
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)


def revealing_inputs(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    """Values whose sum depends on the order: exponents spread over 2^±12, neighbours that nearly cancel."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    values = torch.randn((num_rows, num_columns), generator=generator, device="cuda")
    exponents = torch.randint(-12, 13, (num_rows, num_columns), generator=generator, device="cuda")
    values = torch.ldexp(values, exponents)
    values[:, 1::2] = torch.where(
        values[:, 1::2].abs() > 1, -values[:, 0::2][:, : values[:, 1::2].shape[1]], values[:, 1::2]
    )
    return values.to(torch.bfloat16)


class LayerBench:
    """One layer's weights and inputs, and its reference results for every row count at once."""

    def __init__(self, ops: CudaOps, layer: Layer, max_rows: int) -> None:
        self.ops, self.layer = ops, layer
        n, k = layer.out_features, layer.in_features
        copies = max(1, min(12, -(-_COLD_BYTES // (n * k * 2))))
        scale = k**-0.5
        self.weights = [
            ops.pack_linear(torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * scale) for _ in range(copies)
        ]
        self.x = torch.randn((max_rows, k), device="cuda", dtype=torch.bfloat16)
        self.hard_x = revealing_inputs(max_rows, k, seed=1)
        self.out_features = layer.outputs
        self.expected = self._reference(self.x)
        self.hard_expected = self._reference(self.hard_x)
        self.hard_accumulators = self._reference(self.hard_x[:512], torch.float32)

    def run(self, plan: LinearPlan, num_rows: int, index: int, out: torch.Tensor) -> None:
        """The product of the first rows and one of the weights."""
        self._run(self.x[:num_rows], index, out, plan)

    def _run(self, x: torch.Tensor, weight_index: int, out: torch.Tensor, plan: LinearPlan) -> None:
        self.ops.run_linear(x, self.weights[weight_index], None, out, plan, silu_mul=self.layer.silu_mul)

    def _reference(self, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        out = torch.empty((x.shape[0], self.out_features), device="cuda", dtype=dtype)
        self._run(x, 0, out, REFERENCE_LINEAR)
        return out

    def differing(self, plan: LinearPlan, num_rows: int) -> int:
        """Bits compared on plain and on revealing inputs, result poisoned before."""
        total = 0
        for x, expected in ((self.x, self.expected), (self.hard_x, self.hard_expected)):
            out = torch.full((num_rows, self.out_features), float("nan"), device="cuda", dtype=torch.bfloat16)
            self._run(x[:num_rows], 0, out, plan)
            total += int((out.view(torch.int16) != expected[:num_rows].view(torch.int16)).sum())
        if plan.kind != "cublaslt":  # the accumulator itself, of as many rows as there is room for
            rows = min(num_rows, 512)
            out = torch.full((rows, self.out_features), float("nan"), device="cuda", dtype=torch.float32)
            self._run(self.hard_x[:rows], 0, out, plan)
            total += int((out.view(torch.int32) != self.hard_accumulators[:rows].view(torch.int32)).sum())
        return total

    def compare(self, plans: list[LinearPlan], num_rows: int) -> tuple[list[float], list[list[float]]]:
        """Milliseconds of default cuBLAS and of each plan, per round, taking turns."""
        x = self.x[:num_rows]
        n = self.layer.out_features
        wide = [torch.empty((num_rows, n), device="cuda", dtype=torch.bfloat16) for _ in self.weights]
        outs = [torch.empty((num_rows, self.out_features), device="cuda", dtype=torch.bfloat16) for _ in self.weights]
        indices = range(len(self.weights))
        default = [self._default_call(x, i, wide[i], outs[0], captured=True) for i in indices]
        ours = [[self._plan_call(x, i, outs[i], plan) for i in indices] for plan in plans]
        times = interleaved_ms([default, *ours])
        return times[0], times[1:]

    def _plan_call(self, x: torch.Tensor, index: int, out: torch.Tensor, plan: LinearPlan) -> Callable[[], None]:
        return lambda: self._run(x, index, out, plan)

    def _default_call(
        self, x: torch.Tensor, index: int, wide: torch.Tensor, fused: torch.Tensor, *, captured: bool
    ) -> Callable[[], None]:
        """cuBLAS as torch sets it up, then a SwiGLU kernel where ours is fused."""

        def run() -> None:
            if captured:
                use_default_cublas()
            torch.mm(x, self.weights[index].weight_NK.t(), out=wide)
            if captured:
                use_admitted_cublas()
            if self.layer.silu_mul:
                run_silu_mul(wide, fused)

        return run

    def time_plan(self, plan: LinearPlan, num_rows: int, **timing: float) -> float:
        x = self.x[:num_rows]
        outs = [torch.empty((num_rows, self.out_features), device="cuda", dtype=torch.bfloat16) for _ in self.weights]
        calls = [self._plan_call(x, index, outs[index], plan) for index in range(len(self.weights))]
        return graph_ms(calls, **timing)  # type: ignore[arg-type]

    def time_default(self, num_rows: int, **timing: float) -> tuple[float, int]:
        """Default cuBLAS (and a separate SwiGLU kernel where ours is fused), and its differing bits."""
        x = self.x[:num_rows]
        n = self.layer.out_features
        outs = [torch.empty((num_rows, n), device="cuda", dtype=torch.bfloat16) for _ in self.weights]
        fused = torch.empty((num_rows, self.out_features), device="cuda", dtype=torch.bfloat16)

        use_default_cublas()
        calls = [self._default_call(x, i, outs[i], fused, captured=False) for i in range(len(self.weights))]
        milliseconds = graph_ms(calls, **timing)  # type: ignore[arg-type]
        calls[0]()
        use_admitted_cublas()
        result = fused if self.layer.silu_mul else outs[0]
        return milliseconds, int((result.view(torch.int16) != self.expected[:num_rows].view(torch.int16)).sum())


def sweep(
    ops: CudaOps,
    layers: Iterable[Layer],
    row_counts: Iterable[int],
    emit: Callable[[Measurement], None],
    deadline_s: float,
    plans_for: Callable[[Layer, int], list[LinearPlan]] | None = None,
) -> None:
    """Measure every candidate of every cell until the deadline (of time.monotonic())."""
    row_counts = tuple(row_counts)
    for layer in layers:
        if time.monotonic() > deadline_s:
            return
        bench = LayerBench(ops, layer, max(row_counts))
        seen: dict[int, list[Measurement]] = {}
        for num_rows in sorted(row_counts, key=lambda rows: rows in (2, 4, 8)):
            if time.monotonic() > deadline_s:
                break
            milliseconds, differing = bench.time_default(num_rows)
            emit(Measurement(layer.name, num_rows, None, milliseconds, differing))
            if plans_for is not None:
                plans = plans_for(layer, num_rows)
            elif num_rows in (2, 4, 8) and 1 in seen and 16 in seen:
                best = (
                    sorted(seen[1], key=lambda m: m.milliseconds)[:3]
                    + sorted(seen[16], key=lambda m: m.milliseconds)[:3]
                )
                plans = list(dict.fromkeys(m.plan for m in best if m.plan is not None))
            else:
                plans = candidates(num_rows, silu_mul=layer.silu_mul)
            seen[num_rows] = []
            for plan in plans:
                measurement = _measure(bench, plan, num_rows)
                emit(measurement)
                if not measurement.error and not measurement.differing:
                    seen[num_rows].append(measurement)
        del bench
        torch.cuda.empty_cache()


def _measure(bench: LayerBench, plan: LinearPlan, num_rows: int) -> Measurement:
    try:
        differing = bench.differing(plan, num_rows)
        milliseconds = bench.time_plan(plan, num_rows, min_ms=2.0, replays=3)
    except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
        return Measurement(bench.layer.name, num_rows, plan, float("inf"), -1, f"{type(error).__name__}: {error}"[:200])
    return Measurement(bench.layer.name, num_rows, plan, milliseconds, differing)
