"""The FP8 Triton kernels in Triton's interpreter, as `triton_interpret_cases.py` has the others.

The interpreter does not round to e4m3 as the hardware does, so activations here are numbers that their scale
maps to e4m3 exactly. The warp-group kernels (Gluon) have no interpreter; they are compiled in
`test_fp8_compile.py` and run in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from cluster.engine.kernels import fp8
from cluster.engine.kernels.fp8 import Scaling, quantize_rows, quantize_weight, quantize_weight_blocks, split_rows
from cluster.engine.kernels.triton import fp8_launch, launch
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan
from tests.gpu.support import bits_equal, relative_error

PLANS = [
    Fp8Plan(block_m=64, block_n=32),
    Fp8Plan(block_m=16, block_n=64, swap=True),
    Fp8Plan(kind="tma", block_m=64, block_n=32),
    Fp8Plan(kind="tma", block_m=16, block_n=64, swap=True, persistent=False, store_parts=2),
]


def exact_values(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """bf16 rows of e4m3 numbers times a power of two per row, with the largest, 448, in each group of 128."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn((num_rows, num_columns), generator=generator) * 60).to(torch.float8_e4m3fn).float()
    values[:, ::128] = 448.0
    return (values * torch.randint(-3, 4, (num_rows, 1), generator=generator).exp2()).bfloat16()


def operands(x: torch.Tensor, outputs: int, block_rows: int) -> tuple[fp8_launch.Fp8Operands, torch.Tensor]:
    """What the kernels read, and the float64 matrix W stands for."""
    weight_NK = torch.randn((outputs, x.shape[1]), generator=torch.Generator().manual_seed(1))
    layer = quantize_weight_blocks(weight_NK, block_rows) if block_rows else quantize_weight(weight_NK)
    scaling = Scaling.BLOCK if block_rows else Scaling.CHANNEL
    values, scales = split_rows(quantize_rows(x, scaling), x.shape[1], scaling)
    padded = torch.zeros((outputs, fp8.padded_features(x.shape[1])), dtype=torch.uint8)
    padded[:, : x.shape[1]] = layer[0].view(torch.uint8)
    found = fp8_launch.Fp8Operands(values, scales, padded.view(torch.float8_e4m3fn), layer[1], block_rows)
    return found, fp8.dequantize_weight(*layer).double()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("num_rows", "block_rows"), [(1, 0), (21, 32), (5, 16)])
def test_linear(plan: Fp8Plan, num_rows: int, block_rows: int) -> None:
    x = exact_values(num_rows, 200)
    operands_, weight = operands(x, 192, block_rows)
    bias = torch.randn(192).half()
    out = torch.full((num_rows, 192), torch.nan)
    fp8_launch.run_linear(operands_, bias, out, plan, num_programs=2)
    product = x.double() @ weight.t()
    assert relative_error(out, product + bias.double()) < 1e-5
    gated = torch.full((num_rows, 96), torch.nan)
    fp8_launch.run_linear(operands_, None, gated, plan, silu_mul=True, num_programs=2)
    gate, up = product.chunk(2, dim=1)
    assert relative_error(gated, gate / (1 + torch.exp(-gate)) * up) < 1e-2  # gate and up as bf16


@pytest.mark.parametrize("chain", [2, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_longer_chains_are_filled_up_with_zeros(plan: Fp8Plan, chain: int) -> None:
    """Three groups. What lies behind them in a row, its scale, is no number to multiply."""
    x = exact_values(21, 300)
    operands_, weight = operands(x, 192, 0)
    product = x.double() @ weight.t()
    out = torch.full((21, 192), torch.nan)
    fp8_launch.run_linear(operands_, None, out, plan, num_programs=2, chain=chain)
    assert relative_error(out, product) < 1e-5
    gated = torch.full((21, 96), torch.nan)
    fp8_launch.run_linear(operands_, None, gated, plan, silu_mul=True, num_programs=2, chain=chain)
    gate, up = product.chunk(2, dim=1)
    assert relative_error(gated, gate / (1 + torch.exp(-gate)) * up) < 1e-2


def test_a_plan_for_the_copy_engine_falls_back_where_results_are_not_aligned() -> None:
    x = exact_values(3, 128)
    operands_, weight = operands(x, 5, 0)
    out = torch.full((3, 5), torch.nan)
    fp8_launch.run_linear(operands_, None, out, PLANS[2])
    assert relative_error(out, x.double() @ weight.t()) < 1e-5


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("width", [32, 128, 300, 512])
def test_quantise(scaling: Scaling, width: int) -> None:
    x = exact_values(5, width)
    x[1] = 0.0
    x[2, width - 1] = torch.nan
    x[3, 0] = -torch.inf
    found = split_rows(fp8_launch.quantize(x, scaling), width, scaling)
    expected = split_rows(quantize_rows(x, scaling), width, scaling)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert bits_equal(found[1].nan_to_num(1.0), expected[1].nan_to_num(1.0))
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    assert bool(found[1][2, -1].isnan())


def test_silu_mul_then_quantise() -> None:
    """gate = 64 leaves silu(gate) = gate; so the products are as exact as `up` is."""
    up = exact_values(4, 256) / 64
    both = torch.cat([torch.full_like(up, 64.0), up], dim=1)
    found = split_rows(fp8_launch.silu_mul_quantize(both, Scaling.CHANNEL), 256, Scaling.CHANNEL)
    expected = split_rows(quantize_rows(up * 64, Scaling.CHANNEL), 256, Scaling.CHANNEL)
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("width", [64, 96, 384])
def test_norm_then_quantise(width: int) -> None:
    """Rows of ±a have the norm ±1 (eps is negligible), which any scale maps to e4m3 exactly."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (4, width), generator=generator) * 2.0 - 1.0
    update = signs * torch.tensor([1.0, 2.0, 0.5, 8.0])[:, None]
    residual = torch.zeros((4, width))
    found = fp8_launch.rms_norm_quantize(residual, update.bfloat16(), torch.ones(width), 1e-12, Scaling.CHANNEL)
    assert torch.equal(residual, update)
    values, scales = split_rows(found, width, Scaling.CHANNEL)
    assert torch.equal(values[:, :width].float(), signs * 448.0)
    assert torch.allclose(scales, torch.full((4, 1), 1 / 448), rtol=1e-2)
    plain = launch.run_rms_norm(update, None, torch.ones(width), 1e-12, torch.float32)
    assert torch.allclose(plain, signs)
    with pytest.raises(ValueError, match="in place"):
        fp8_launch.rms_norm_quantize(
            torch.zeros(4, 2 * width)[:, ::2], update, torch.ones(width), 1e-6, Scaling.CHANNEL
        )
