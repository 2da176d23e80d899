"""What admission is tried on: operations of each kind, a plan for each, and mistakes in the kernel that it starts.

For Triton's interpreter (fp16 operands on the CPU) and for a GPU (bf16)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fingerprint import probe_outputs
from cluster.engine.kernels.fp8 import quantize_weight, quantize_weight_blocks
from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probes import Probe
from cluster.engine.kernels.probes_moe import random_choice
from cluster.engine.kernels.registry import describe_difference
from cluster.engine.kernels.triton import attention, fp8_linear, heads, latent, linear, moe
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, Fp8Plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8PlanIndex, Fp8Table
from cluster.engine.kernels.triton.moe_plans import (
    REFERENCE_MOE,
    GroupedPlan,
    MoeEntry,
    MoePlan,
    MoePlanIndex,
    MoeShape,
    MoeTable,
)
from cluster.engine.kernels.triton.plans import (
    REFERENCE_ATTENTION,
    REFERENCE_LATENT,
    REFERENCE_LINEAR,
    AttentionPlan,
    LatentPlan,
    LinearPlan,
)
from cluster.engine.kernels.triton.table import LinearEntry, PlanIndex, PlanTable
from tests.gpu.support import Paged, mutated
from tests.gpu.support_latent import PagedLatent

COPY_ENGINE = LinearPlan(kind="tma", block_m=16, block_n=32, block_k=64)
FEW = MoePlan(
    kind="few", block_m=32, gate_up=GroupedPlan(block_k=64, num_stages=2), down=GroupedPlan(block_k=64, num_stages=2)
)
FP8_COPY_ENGINE = Fp8Plan(kind="tma", block_m=64, block_n=32)
ATTENTION = AttentionPlan(prefill_block_rows=32, prefill_use_tma=True)
LATENT = LatentPlan(prefill_block_rows=32, prefill_halves=False)
MOE_SHAPE = MoeShape(num_experts=6, top_k=2, hidden=64, features=256)

COMPILE_THREADS = 6

DTYPE = {"cpu": torch.float16, "cuda": torch.bfloat16}


def name_plans(ops: CudaOps) -> CudaOps:
    """From now on `ops` wants the plans above for everything."""
    ops.latent_plan = LATENT
    return _with_plans(ops, COPY_ENGINE, FEW, FP8_COPY_ENGINE, ATTENTION)


def with_references(ops: CudaOps) -> CudaOps:
    ops.latent_plan = REFERENCE_LATENT
    return _with_plans(ops, REFERENCE_LINEAR, REFERENCE_MOE, REFERENCE_FP8, REFERENCE_ATTENTION)


def _with_plans(
    ops: CudaOps, plan: LinearPlan, moe_plan: MoePlan, fp8_plan: Fp8Plan, attention_plan: AttentionPlan
) -> CudaOps:
    entries = [
        LinearEntry(out_features=1, in_features=1, max_rows=1, silu_mul=silu_mul, plan=plan)
        for silu_mul in (False, True)
    ]
    ops.plans = PlanIndex(PlanTable(device="none", linear=tuple(entries), attention=attention_plan))
    moe_entry = MoeEntry(shape=MOE_SHAPE, max_rows=32, plan=moe_plan)
    ops.moe_plans = MoePlanIndex(MoeTable(device="none", entries=(moe_entry,)))
    fp8_entry = Fp8Entry(out_features=1, in_features=1, max_rows=1, plan=fp8_plan)
    ops.fp8.plans = Fp8PlanIndex(Fp8Table(device="none", linear=(fp8_entry,)))
    return ops


def drawn(ops: CudaOps, seed: int, *shape: int) -> torch.Tensor:
    """Normal values, divided by the root of their last size, on the device of `ops`."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * math.sqrt(1 / shape[-1])
    return values.to(ops.device, DTYPE[ops.device.type])


def differing_probes(ops: Ops, reference: Ops, probes: Sequence[Probe]) -> dict[str, str]:
    """By name, where. Threads compile the kernels of several probes at once."""
    found = {}
    sides = (probe_outputs(each, probes, COMPILE_THREADS) for each in (ops, reference))
    for probe, ours, theirs in zip(probes, *sides, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            difference = describe_difference(mine.cpu(), other.cpu())
            if difference is not None:
                found[probe.name] = difference
    return found


def run_linear(ops: CudaOps) -> torch.Tensor:
    x, bias = drawn(ops, 1, 9, 320), drawn(ops, 3, 48)
    weight = ops.pack_linear(drawn(ops, 2, 48, 320))
    return torch.cat([ops.linear(x, weight, each, out_dtype=torch.float32) for each in (None, bias)])


def run_swiglu(ops: CudaOps) -> torch.Tensor:
    """fp32 results: `linear_silu_mul` rounds them."""
    weight = ops.pack_linear(drawn(ops, 5, 96, 320))
    out = torch.empty((9, 48), device=ops.device)
    plan = ops.plans.linear(48, 320, 9, silu_mul=True)
    ops._serve_linear(drawn(ops, 4, 9, 320) * 20, weight, None, out, plan, silu_mul=True)
    return out


def run_experts(ops: CudaOps) -> torch.Tensor:
    gate_up, down = ops.pack_experts(drawn(ops, 7, 6, 512, 64)), ops.pack_experts(drawn(ops, 8, 6, 64, 256))
    return ops.moe_experts(drawn(ops, 6, 7, 64) * 8, random_choice(7, 6, 2, seed=1).to(ops.device), gate_up, down)


def run_fp8(ops: CudaOps) -> torch.Tensor:
    weight_NK = drawn(ops, 9, 64, 600).float().cpu()
    packed = [ops.pack_fp8(*quantize_weight(weight_NK)), ops.pack_fp8(*quantize_weight_blocks(weight_NK, 32))]
    x = drawn(ops, 10, 5, 600)
    return torch.cat([ops.linear(x, each, out_dtype=torch.float32) for each in packed])


def run_attention(ops: CudaOps, rows: list[int]) -> torch.Tensor:
    device = ops.device.type
    cache = Paged([1100, 70], num_heads=4, num_kv_heads=2, head_size=64, dtype=DTYPE[device], device=device)
    metadata = cache.metadata([0, 1], rows, cache.contexts)
    q = torch.cat([cache.q[i][context - rows[i] : context] for i, context in enumerate(cache.contexts)])
    return ops.attention(q, cache.layer, metadata, cache.scale)


def run_decode(ops: CudaOps) -> torch.Tensor:
    return run_attention(ops, [1, 1])


def run_prefill(ops: CudaOps) -> torch.Tensor:
    return run_attention(ops, [80, 33])


def run_latent(ops: CudaOps, rows: list[int]) -> torch.Tensor:
    device = ops.device.type
    shape: dict[str, Any] = {"num_heads": 4, "latent_size": 64, "rope_size": 16, "dtype": DTYPE[device]}
    cache = PagedLatent([600, 70], device=device, **shape)
    metadata = cache.metadata([0, 1], rows, cache.contexts)
    q, q_rope = (
        torch.cat([each[i][context - rows[i] : context] for i, context in enumerate(cache.contexts)])
        for each in (cache.q, cache.q_rope)
    )
    return ops.latent_attention(q, q_rope, cache.layer, metadata, cache.scale)


def run_latent_decode(ops: CudaOps) -> torch.Tensor:
    return run_latent(ops, [1, 1])


def run_latent_prefill(ops: CudaOps) -> torch.Tensor:
    return run_latent(ops, [80, 33])


def run_heads(ops: CudaOps) -> torch.Tensor:
    """More rows than plans for few have: the interpreter's products have other bits with operands swapped."""
    return ops.head_linear(drawn(ops, 11, 70, 4, 320), ops.pack_heads(drawn(ops, 12, 4, 48, 320)))


OPERATIONS: dict[str, Callable[[CudaOps], torch.Tensor]] = {
    "linear": run_linear,
    "swiglu": run_swiglu,
    "experts": run_experts,
    "fp8": run_fp8,
    "decode": run_decode,
    "prefill": run_prefill,
    "latent decode": run_latent_decode,
    "latent prefill": run_latent_prefill,
    "heads": run_heads,
}


class Planted:
    """A kernel, or `instead` where it is started as the plans above have it."""

    def __init__(self, kernel: Any, instead: Any, is_tried: Callable[[dict[str, Any]], bool]) -> None:
        self._kernel, self._instead, self._is_tried = kernel, instead, is_tried

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*arguments: Any, **options: Any) -> None:
            (self._instead if self._is_tried(options) else self._kernel)[grid](*arguments, **options)

        return start


class TooLarge:
    """A kernel that cannot be launched."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*arguments: Any, **options: Any) -> None:
            raise OutOfResources(300_000, 232_448, "shared memory")

        return start


@dataclass(frozen=True)
class Kernel:
    """What a plan above starts, and mistakes in its source that give other bits: K, or splits, in another order."""

    module: ModuleType
    name: str
    mistakes: list[tuple[str, str]]
    is_tried: Callable[[dict[str, Any]], bool] = lambda options: True


MOVED = "(SPLIT_KEYS - context % SPLIT_KEYS) // 64 * 64"  # splits are counted from the end of the context
LAST = "(K - 1) // BLOCK_K * BLOCK_K - k"
LINEAR = Kernel(
    linear,
    "tma_kernel",
    [
        ("x_desc.load([row, k])", f"x_desc.load([row, {LAST}])"),
        ("w_desc.load([column, k])", f"w_desc.load([column, {LAST}])"),
        ("w_desc.load([N + column, k])", f"w_desc.load([N + column, {LAST}])"),
    ],
)
KERNELS = {
    "linear": LINEAR,
    "swiglu": LINEAR,
    "experts": Kernel(
        moe,
        "few_kernel",
        [
            (
                "    for k in range(0, K, BLOCK_K):",
                "    for k in range((K - 1) // BLOCK_K * BLOCK_K, -1, -BLOCK_K):",
            )
        ],
        lambda options: options["num_stages"] == FEW.down.num_stages,
    ),
    "fp8": Kernel(
        fp8_linear,
        "fp8_tma_kernel",
        [
            ("x_desc.load([row, group * GROUP_K])", "x_desc.load([row, K - (group + 1) * GROUP_K])"),
            ("w_desc.load([column, group * GROUP_K])", "w_desc.load([column, K - (group + 1) * GROUP_K])"),
        ],
    ),
    "decode": Kernel(
        attention,
        "split_kernel",
        [
            (
                "first_key = split * SPLIT_KEYS",
                f"first_key = tl.maximum(split * SPLIT_KEYS - {MOVED}, 0)",
            ),
            (
                "tl.minimum(first_key + SPLIT_KEYS, context)",
                f"tl.minimum((split + 1) * SPLIT_KEYS - {MOVED}, context)",
            ),
        ],
        lambda options: options["num_stages"] == ATTENTION.split_num_stages,
    ),
    "prefill": Kernel(
        attention,
        "prefill_kernel",
        [("tl.range(full_start, full_stop, BLOCK_KV)", "tl.range(full_start, full_stop - BLOCK_KV, BLOCK_KV)")],
        lambda options: options["USE_TMA"],
    ),
    "latent decode": Kernel(
        latent,
        "latent_split_kernel",
        [
            ("first_key = split * SPLIT_KEYS", f"first_key = tl.maximum(split * SPLIT_KEYS - {MOVED}, 0)"),
            ("tl.minimum(first_key + SPLIT_KEYS, context)", f"tl.minimum((split + 1) * SPLIT_KEYS - {MOVED}, context)"),
        ],
        lambda options: options["num_stages"] == LATENT.split_num_stages,
    ),
    "latent prefill": Kernel(
        latent,
        "latent_prefill_kernel",
        [("tl.range(0, key_stop, BLOCK_KV)", "tl.range(0, key_stop - BLOCK_KV, BLOCK_KV)")],
        lambda options: options["num_stages"] == LATENT.prefill_num_stages,
    ),
    "heads": Kernel(
        heads,
        "head_chain_kernel",
        [("w_ptr + head * N * K", "w_ptr + head // 2 * 2 * N * K")],
        lambda options: options["num_stages"] != REFERENCE_LINEAR.num_stages,
    ),
}


def plant(name: str, instead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS[name]
    planted = Planted(getattr(kernel.module, kernel.name), instead, kernel.is_tried)
    monkeypatch.setattr(kernel.module, kernel.name, planted)


def plant_mistake(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS[name]
    broken = kernel.module
    for old, new in kernel.mistakes:
        broken = mutated(broken, old, new, directory)
    plant(name, getattr(broken, kernel.name), monkeypatch)
