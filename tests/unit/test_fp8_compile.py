"""FP8 kernels as machine code, without a GPU: the instruction that decides bits, registers, the order of sums."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from cluster.engine.kernels import fp8
from cluster.engine.kernels.fp8 import Scaling
from cluster.engine.kernels.triton import fp8_launch, launch
from cluster.engine.kernels.triton.fp8_plans import REFERENCE_FP8, UNMEASURED_FP8, Fp8Plan
from tests.unit.triton_compile import compiled_for_hopper, innermost_loops, machine_code, spilled_bytes, sum_layouts

STREAM = Fp8Plan(kind="stream", block_m=8, num_stages=3)
RINGS = Fp8Plan(kind="rings", block_m=128, block_n=256, num_stages=9, x_stages=4, lead=4, store_parts=2)
NARROW_RINGS = Fp8Plan(kind="rings", block_m=128, block_n=128, num_stages=9, x_stages=4, lead=2, store_parts=2)
CASES = {
    "reference": (REFERENCE_FP8, 0, False, 0),
    "few rows": (UNMEASURED_FP8[0][1], 0, True, 0),
    "tma": (Fp8Plan(kind="tma", block_m=128, block_n=128, num_warps=8, num_stages=4), 0, False, 0),
    "rings": (RINGS, 0, False, 0),
    "rings, SwiGLU": (NARROW_RINGS, 0, True, 0),
    "rings, blocks": (NARROW_RINGS, 128, False, 0),
    "stream": (STREAM, 0, False, 0),
    "stream, blocks, SwiGLU": (STREAM, 64, True, 0),
}


def start(
    plan: Fp8Plan, scale_rows: int, silu_mul: bool, dtype: torch.dtype = torch.bfloat16, *, has_bias: bool = False,
    inputs: int = 512, chain: int = 1,
) -> None:  # fmt: skip
    num_rows, outputs = 40, 1024
    scaling = Scaling.BLOCK if scale_rows else Scaling.CHANNEL
    rows = torch.zeros((num_rows, fp8.row_bytes(inputs, scaling)), dtype=torch.uint8)
    weight_rows = outputs * (2 if silu_mul else 1)
    values = torch.zeros((weight_rows, inputs), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.ones((weight_rows // scale_rows, inputs // 128) if scale_rows else (weight_rows,))
    operands = fp8_launch.Fp8Operands(*fp8.split_rows(rows, inputs, scaling), values, scale, scale_rows)
    out = torch.empty((num_rows, outputs), dtype=dtype)
    bias = torch.zeros(outputs, dtype=torch.bfloat16) if has_bias else None
    fp8_launch.run_linear(operands, bias, out, plan, silu_mul=silu_mul, num_programs=4, chain=chain)


@pytest.mark.parametrize(("plan", "scale_rows", "silu_mul", "spills"), CASES.values(), ids=CASES)
def test_products_run_on_wgmma_alone(
    plan: Fp8Plan, scale_rows: int, silu_mul: bool, spills: int, tmp_path: Path
) -> None:
    with compiled_for_hopper(tmp_path) as kernels:
        start(plan, scale_rows, silu_mul)
    (kernel,) = kernels
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "e4m3.e4m3" in ptx
    assert "mma.sync" not in ptx  # it accumulates e4m3 otherwise
    of_compiler = re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.DOTALL)
    assert "fma.rn.f32" not in of_compiler or scale_rows
    assert not re.search(r"(add|mul)\.f32", ptx)  # without .rn the assembler may fuse a product with a sum
    assert spilled_bytes(kernel) <= spills


@pytest.mark.parametrize("chain", [1, 2, 4])
@pytest.mark.parametrize(
    "plan",
    [REFERENCE_FP8, UNMEASURED_FP8[0][1], CASES["tma"][0], RINGS, NARROW_RINGS, STREAM],
    ids=lambda plan: f"{plan.kind}{plan.block_n}",
)
def test_a_chain_begins_at_zero_and_stays_in_the_tensor_core(plan: Fp8Plan, chain: int, tmp_path: Path) -> None:
    """13 groups: the last chain is filled up."""
    with compiled_for_hopper(tmp_path) as kernels:
        start(plan, 0, False, inputs=1664, chain=chain)
    (kernel,) = kernels
    assert "mma.sync" not in kernel.asm["ptx"]
    products = re.findall(r"QGMMA.*", machine_code(kernel))
    assert plan.kind != "rings" or spilled_bytes(kernel) == 0
    at_zero = [product for product in products if "RZ, !UPT" in product]
    assert len(products) == 4 * chain * len(at_zero) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_loop_of_the_rings_has_products_and_sums_and_little_else(
    dtype: torch.dtype, has_bias: bool, tmp_path: Path
) -> None:
    with compiled_for_hopper(tmp_path) as kernels:
        start(RINGS, 0, False, dtype, has_bias=has_bias, chain=2)
    (kernel,) = kernels
    loops = [loop for loop in innermost_loops(kernel) if "QGMMA" in loop]
    assert len(loops) == 2  # one of each consumer
    for loop in loops:
        assert loop.count("QGMMA") == 16
        assert loop.count("FADD") == 128
        instructions = [line.strip() for line in loop.splitlines()]
        assert sum(not re.match(r"(@!?U?P\d )?U", line) for line in instructions) < 230  # U: in the uniform datapath
        assert "R2UR" not in loop  # addresses stay in uniform registers
        assert "LDL" not in loop
        assert loop.count("WARPGROUP.DEPBAR") == 4  # of each group: the assembler waits for no one
    ptx = kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.2d.global.shared" in ptx
    assert "st.global" not in ptx
    assert spilled_bytes(kernel) == 0


@pytest.mark.parametrize("plan", [NARROW_RINGS, STREAM], ids=lambda plan: plan.kind)
def test_quotients_of_swiglu_overlap(plan: Fp8Plan, tmp_path: Path) -> None:
    """A division of Triton's has a branch of its own, and the next one waits for it."""
    with compiled_for_hopper(tmp_path) as kernels:
        start(plan, 0, True)
    code = machine_code(kernels[0])
    assert "F2F." not in code  # nor are numbers rounded one at a time
    assert "RCP,RCP,RCP,RCP" in ",".join(re.findall(r"RCP|FCHK", code))


def test_a_tile_too_small_for_wgmma_would_run_on_another_instruction(tmp_path: Path) -> None:
    """Why plans are refused: without the check Triton takes mma.sync and says nothing."""
    with pytest.raises(ValueError, match="wgmma needs a tall side"):
        Fp8Plan(block_m=16, block_n=64)
    with pytest.raises(ValueError, match="the narrow one from 16"):
        Fp8Plan(block_m=8, block_n=64, swap=True)
    unchecked = SimpleNamespace(**msgspec.structs.asdict(Fp8Plan()) | {"block_m": 16})
    with compiled_for_hopper(tmp_path) as kernels:
        start(cast("Fp8Plan", unchecked), 0, False)
    assert "mma.sync" in kernels[0].asm["ptx"]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "rings", "block_m": 64, "block_n": 128},
        {"kind": "rings", "block_m": 128, "block_n": 64},
        {"kind": "rings", "block_m": 128, "block_n": 128, "store_parts": 4},
        {"kind": "rings", "block_m": 128, "block_n": 128, "num_stages": 1},
        {"kind": "rings", "block_m": 128, "block_n": 128, "num_stages": 4, "x_stages": 0},
        {"kind": "rings", "block_m": 128, "block_n": 128, "num_stages": 4, "lead": 4},
        {"kind": "stream", "block_m": 8, "block_n": 128},
        {"kind": "stream", "block_m": 128, "block_n": 64},
        {"kind": "tma", "block_m": 128, "block_n": 96},
        {"kind": "chain", "block_m": 64, "block_n": 64, "num_warps": 2},
    ],
)
def test_impossible_plans_are_refused_when_they_are_made(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Fp8Plan"):
        Fp8Plan(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scaling", "width", "has_update"), [(Scaling.CHANNEL, 576, False), (Scaling.BLOCK, 4096, True)]
)
def test_the_fused_norm_sums_in_the_order_of_the_plain_one(
    scaling: Scaling, width: int, has_update: bool, tmp_path: Path
) -> None:
    """The store of a kernel can change how its elements are dealt to threads, and so the order of its sums."""
    residual = torch.zeros((2, width), dtype=torch.bfloat16)
    update = torch.zeros_like(residual) if has_update else None
    norm = torch.ones(width)
    with compiled_for_hopper(tmp_path) as kernels:
        launch.run_rms_norm(residual, update, norm, 1e-5, torch.bfloat16)
        fp8_launch.rms_norm_quantize(residual, update, norm, 1e-5, scaling)
    plain, fused = (sum_layouts(kernel) for kernel in kernels)
    assert plain == fused
    assert len(plain) == 1
