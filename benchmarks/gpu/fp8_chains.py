"""`python -m benchmarks.gpu fp8-chains`: what longer chains in the tensor core would gain, and what they would lose.

A chain of 1, 2 or 4 groups of 128 features (`fp8.CHANNEL_CHAIN`, which decides bits) is summed by the tensor core
before it meets the fp32 accumulator. Of each layer of an 8B model: the fastest plan of each chain, in turns of half a
second where the card's power decides, the energy of a product, and the error of its results against float64. All plans
of a chain must agree.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from benchmarks.gpu import sustained
from benchmarks.gpu.fp8 import short
from benchmarks.gpu.fp8_layers import LAYERS
from benchmarks.gpu.sustained_fp8 import Fp8LayerBench
from cluster.engine.kernels import fp8 as numbers
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import Scaling
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan, unmeasured_plan

CHAINS = (1, 2, 4)
_ROWS = (8192, 1024, 16)
_POWER_ROWS = 1024  # from here on a turn is long enough for the card to settle at the clock that its power allows
_LONG_TURN_S, _SHORT_TURN_S = 0.5, 0.05
_ROUNDS = 2
_ERROR_ROWS = 256


class Chained(NamedTuple):
    plan: Fp8Plan
    chain: int


class Best(NamedTuple):
    ms: float
    mj: float
    name: str


NONE = Best(math.nan, math.nan, "-")


class ChainBench:
    """A layer whose products are told the length of their chains."""

    def __init__(self, layer: Fp8LayerBench) -> None:
        self._layer = layer
        self.out_features = layer.out_features
        self.weights = layer.weights
        self._expected = {chain: self._result(Chained(REFERENCE_FP8, chain), max(_ROWS)) for chain in CHAINS}

    def _result(self, plan: Chained, num_rows: int) -> torch.Tensor:
        out = torch.full((num_rows, self.out_features), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.run(plan, num_rows, 0, out)
        return out

    def run(self, plan: Chained, num_rows: int, index: int, out: torch.Tensor) -> None:
        self._layer.run(plan.plan, num_rows, index, out, chain=plan.chain)

    def differing(self, plan: Chained, num_rows: int) -> int:
        return int((self._result(plan, num_rows) != self._expected[plan.chain][:num_rows]).sum())

    def error(self, chain: int) -> float:
        """Relative, root mean square, of fp32 results; not of SwiGLU, which rounds in between."""
        weight, features = self.weights[0], self._layer.layer.in_features
        out = torch.empty((_ERROR_ROWS, self.out_features), device="cuda")
        self.run(Chained(REFERENCE_FP8, chain), _ERROR_ROWS, 0, out)
        values, scales = numbers.split_rows(self._layer.rows[:_ERROR_ROWS], features, Scaling.CHANNEL)
        exact = (values.double() @ weight.values_NP.double().t()) * scales.double() * weight.scale.double()
        return float((out - exact).norm() / exact.norm())


def plans(num_rows: int, chain: int, *, silu_mul: bool) -> list[Chained]:
    if num_rows <= 64:
        return [Chained(Fp8Plan(kind="stream", block_m=16, num_stages=2), chain), Chained(unmeasured_plan(16), chain)]
    width = 128 if silu_mul else 256
    depths = ((9, 4, 4), (8, 5, 3))
    return [
        Chained(
            Fp8Plan(
                kind="rings", block_m=128, block_n=width, num_stages=num_stages, x_stages=x_stages, lead=lead,
                store_parts=2, group_m=16,
            ),
            chain,
        )
        for num_stages, x_stages, lead in depths
    ]  # fmt: skip


def run(budget_s: float) -> None:
    """Print a line for each layer and row count; begin none after the budget."""
    deadline_s = time.monotonic() + budget_s
    ops = CudaOps(torch.device("cuda"))
    print("layer            rows      us of chains 1, 2, 4      2 / 1  4 / 1  mJ of a product  errors")
    for layer in (layer for layer in LAYERS if layer.name != "8b.gate_up"):  # SwiGLU is fused into it
        bench = ChainBench(Fp8LayerBench(ops, layer))
        errors = "" if layer.silu_mul else " ".join(f"{bench.error(chain):.2e}" for chain in CHAINS)
        for num_rows in _ROWS:
            if time.monotonic() > deadline_s:
                print(f"not begun: {layer.name}, {num_rows} rows")
                continue
            offered = [plan for chain in CHAINS for plan in plans(num_rows, chain, silu_mul=layer.silu_mul)]
            sound = sustained.sound_plans(bench, offered, num_rows)
            seconds = _LONG_TURN_S if num_rows >= _POWER_ROWS else _SHORT_TURN_S
            turns = sustained.measure(bench, sound, num_rows, seconds, _ROUNDS)
            best: dict[int, Best] = {}
            for plan, of_plan in zip(sound, turns, strict=True):
                one = Best(of_plan.median_ms, of_plan.median_mj, short(plan.plan))
                best[plan.chain] = min(best.get(plan.chain, one), one)
            found = [best.get(chain, NONE) for chain in CHAINS]
            us = " ".join(f"{each.ms * 1e3:8.1f}" for each in found)
            ratios = "  ".join(f"{each.ms / found[0].ms:.3f}" for each in found[1:])
            energies = " ".join(f"{each.mj:6.1f}" for each in found)
            names = ", ".join(each.name for each in found)
            print(f"{layer.name:16s} {num_rows:5d} {us}  {ratios}  {energies}  {errors}  {names}", flush=True)
        del bench
        torch.cuda.empty_cache()
