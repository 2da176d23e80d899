"""Starts the FP8 kernels: checks shapes, picks grids, owns no state, never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cluster.engine.kernels import fp8
from cluster.engine.kernels.fp8 import GROUP, Scaling
from cluster.engine.kernels.triton import fp8_linear, fp8_quant
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan, fitting, unmeasured_plan
from cluster.engine.kernels.triton.launch import aligned, run_rms_norm

_SHARED_BYTES = 227 * 1024  # of a multiprocessor of an H100 or H200
_STREAM_REGISTERS = {1: 248, 2: 128, 3: 80}  # by programs that share a multiprocessor; a program has 256 threads


@dataclass(frozen=True, slots=True)
class Fp8Operands:
    """A product's operands as the kernels read them. Rows of all are dense and start at multiples of 16 bytes."""

    x_MP: torch.Tensor  # float8_e4m3fn
    x_scale_MS: torch.Tensor  # float32, S = 1 or G
    w_NP: torch.Tensor  # float8_e4m3fn; 2N rows [gate; up] with SwiGLU
    w_scale: torch.Tensor  # float32, (N,) or (N / scale_rows, G)
    scale_rows: int  # rows of W that share a block scale; 0: CHANNEL


def quantize(x_TK: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`fp8.quantize_rows` of bf16 activations."""
    num_rows, in_features = x_TK.shape
    x_TK = aligned(x_TK)
    out = _rows_like(x_TK, in_features, scaling)
    if num_rows:
        fp8_quant.quantize_kernel[(num_rows,)](
            x_TK, out.view(torch.float8_e4m3fn), x_TK.stride(0), out.stride(0),
            **_row_constants(in_features, scaling),
        )  # fmt: skip
    return out


def silu_mul_quantize(gate_up_TC: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """silu(gate) * up of bf16 rows [gate; up], quantised."""
    num_rows, in_features = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    out = _rows_like(gate_up_TC, in_features, scaling)
    if num_rows:
        fp8_quant.silu_mul_quantize_kernel[(num_rows,)](
            gate_up_TC, out.view(torch.float8_e4m3fn), gate_up_TC.stride(0), out.stride(0),
            **_row_constants(in_features, scaling),
        )  # fmt: skip
    return out


def rms_norm_quantize(
    x_TK: torch.Tensor, update_TK: torch.Tensor | None, weight_K: torch.Tensor, eps: float, scaling: Scaling
) -> torch.Tensor:
    """`launch.run_rms_norm` in bf16, quantised. Warps and alignment are those of the plain kernel: they decide
    the order of its sum."""
    num_rows, width = x_TK.shape
    if width <= GROUP // 2:  # the norm's program is narrower than a row of quantised values
        return quantize(run_rms_norm(x_TK, update_TK, weight_K, eps, torch.bfloat16), scaling)
    if update_TK is None:
        x_TK = aligned(x_TK)
    elif not x_TK.is_contiguous() or x_TK.data_ptr() % 16:
        raise ValueError("the residual must be dense and 16-byte aligned: it is updated in place")
    else:
        update_TK = aligned(update_TK)
    out = _rows_like(x_TK, width, scaling)
    if num_rows:
        block = triton.next_power_of_2(width)
        fp8_quant.rms_norm_quantize_kernel[(num_rows,)](
            x_TK, x_TK if update_TK is None else update_TK, aligned(weight_K), out.view(torch.float8_e4m3fn), eps,
            out.stride(0), HAS_UPDATE=update_TK is not None,
            **_row_constants(width, scaling) | {"BLOCK_K": block, "num_warps": max(1, min(16, block // 512))},
        )  # fmt: skip
    return out


def _rows_like(x: torch.Tensor, in_features: int, scaling: Scaling) -> torch.Tensor:
    shape = (x.shape[0], fp8.row_bytes(in_features, scaling))
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def _row_constants(in_features: int, scaling: Scaling) -> dict[str, int | bool]:
    block = max(GROUP, triton.next_power_of_2(in_features))
    return {
        "K": in_features,
        "P": fp8.padded_features(in_features),
        "BLOCK_K": block,
        "BLOCK_SCALED": scaling is Scaling.BLOCK,
        "num_warps": max(1, min(16, block // 512)),
    }


def run_linear(
    operands: Fp8Operands,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: Fp8Plan,
    *,
    silu_mul: bool = False,
    num_programs: int = 1,
    promote: bool = True,
    chain: int = fp8.CHANNEL_CHAIN,
) -> None:
    """out = x Wᵀ (+ bias), or silu(gate) * up with W = [gate; up] of 2N rows.

    A plan whose kernel does not take these operands gives way to a chain: other speed, same bits. `promote`
    False is another order of the sum, to be measured; chain and tma only. Another `chain` is, too: groups of each
    sum of the tensor core, 1, 2 or 4; block scales, which belong to a group, make it 1.
    """
    chain = 1 if operands.scale_rows else chain
    plan = fitting(plan, operands.scale_rows, silu_mul=silu_mul, chain=chain)
    call = _Call(operands, bias_N, out_MN, plan, silu_mul, num_programs, promote, chain)
    match plan.kind:
        case "chain":
            _run_chain(call)
        case "tma" if _tma_takes(out_MN):
            _run_tma(call)
        case "rings" if _tma_takes(out_MN):
            _run_rings(call)
        case "stream" if operands.scale_rows % 64 == 0:
            _run_stream(call)
        case _:
            _run_chain(replace(call, plan=unmeasured_plan(out_MN.shape[0])))


@dataclass(frozen=True, slots=True)
class _Call:
    operands: Fp8Operands
    bias_N: torch.Tensor | None
    out_MN: torch.Tensor
    plan: Fp8Plan
    silu_mul: bool
    num_programs: int
    promote: bool
    chain: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, N, P."""
        return *self.out_MN.shape, self.operands.w_NP.shape[1]

    @property
    def num_groups(self) -> int:
        """Of 128 features, with the zeros that fill the last chain up."""
        padded = self.shape[2]
        return -(-padded // (GROUP * self.chain)) * self.chain

    @property
    def tiles(self) -> int:
        num_rows, out_features, _ = self.shape
        return -(-num_rows // self.plan.block_m) * -(-out_features // self.plan.block_n)

    @property
    def bias(self) -> torch.Tensor:
        return self.out_MN if self.bias_N is None else self.bias_N

    def constants(self) -> dict[str, int | bool]:
        plan = self.plan
        return {
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n,
            "GROUP_K": GROUP * self.chain,
            "GROUP_M": plan.group_m,
            "HAS_BIAS": self.bias_N is not None,
            "SILU_MUL": self.silu_mul,
            "SCALE_ROWS": self.operands.scale_rows,
            "num_warps": plan.num_warps,
            "num_stages": max(1, plan.num_stages // self.chain),
            "enable_fp_fusion": False,
        }


def _tma_takes(out_MN: torch.Tensor) -> bool:
    """The bulk copy engine wants rows that start at multiples of 16 bytes; those of the operands do."""
    return out_MN.stride(0) * out_MN.element_size() % 16 == 0 and out_MN.data_ptr() % 16 == 0


def _run_chain(call: _Call) -> None:
    o = call.operands
    fp8_linear.fp8_chain_kernel[(call.tiles,)](
        o.x_MP, o.x_scale_MS, o.w_NP, o.w_scale, call.bias, call.out_MN, *call.shape,
        o.x_MP.stride(0), o.x_scale_MS.stride(0), o.w_NP.stride(0), call.out_MN.stride(0),
        SWAP=call.plan.swap, EVICT_FIRST=call.plan.evict_first, PROMOTE=call.promote,
        FILL_UP=call.num_groups * GROUP > call.shape[2], **call.constants(),
    )  # fmt: skip


def _run_tma(call: _Call) -> None:
    o, plan, out = call.operands, call.plan, call.out_MN
    parts = plan.store_parts * (out.element_size() // 2)
    x_desc = TensorDescriptor.from_tensor(o.x_MP, [plan.block_m, GROUP * call.chain])
    w_desc = TensorDescriptor.from_tensor(o.w_NP, [plan.block_n, GROUP * call.chain])
    out_desc = TensorDescriptor.from_tensor(out, [plan.block_m, plan.block_n // parts])
    programs = min(call.tiles, call.num_programs) if plan.persistent else call.tiles
    fp8_linear.fp8_tma_kernel[(programs,)](
        x_desc, o.x_scale_MS, w_desc, o.w_scale, call.bias, out_desc, *out.shape, call.num_groups * GROUP,
        o.x_scale_MS.stride(0),
        SWAP=plan.swap, STORE_PARTS=parts, FLATTEN=plan.flatten, PROMOTE=call.promote,
        OUT_DTYPE=getattr(triton.language, str(out.dtype).removeprefix("torch.")), **call.constants(),
    )  # fmt: skip


def _run_rings(call: _Call) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    from cluster.engine.kernels.triton import fp8_rings
    from cluster.engine.kernels.triton.gluon_names import shared_layout

    plan, out = call.plan, call.out_MN
    part = 128 // (plan.store_parts * (out.element_size() // 2))
    layout = shared_layout(128, 8 * out.element_size())
    out_desc = GluonTensorDescriptor.from_tensor(out, [64, part], layout)
    programs = min(call.tiles, call.num_programs) if plan.persistent else call.tiles
    fp8_rings.fp8_rings_kernel[(programs,)](
        *_gluon_operands(call, 64, 128), out_desc, *out.shape, call.num_groups, call.operands.x_scale_MS.stride(0),
        BLOCK_N=plan.block_n, GROUP_M=plan.group_m, X_STAGES=plan.x_stages, W_STAGES=plan.num_stages,
        LEAD=min(plan.lead, call.num_groups), **_gluon_constants(call),
    )  # fmt: skip


def _run_stream(call: _Call) -> None:
    from cluster.engine.kernels.triton import fp8_stream

    plan, weights = call.plan, 2 if call.silu_mul else 1
    shared = plan.num_stages * 4 * GROUP * (plan.block_m + 64 * weights)
    most = 3 if plan.block_m * weights <= 32 else 2  # five accumulators must fit a thread's registers
    fp8_stream.fp8_stream_kernel[(call.tiles,)](
        *_gluon_operands(call, plan.block_m, 64), call.out_MN, *call.out_MN.shape, call.num_groups,
        call.operands.x_scale_MS.stride(0), call.out_MN.stride(0), BLOCK_M=plan.block_m, GROUP_K=GROUP,
        STAGES=plan.num_stages, maxnreg=_STREAM_REGISTERS[min(most, max(1, _SHARED_BYTES // shared))],
        **_gluon_constants(call),
    )  # fmt: skip


def _gluon_operands(call: _Call, box_m: int, box_n: int) -> tuple[object, ...]:
    """All but the result. Boxes have that many rows of x and of W."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    from cluster.engine.kernels.triton.gluon_names import shared_layout

    o = call.operands
    layout = shared_layout(128, 8)
    x_desc = GluonTensorDescriptor.from_tensor(o.x_MP, [box_m, GROUP], layout)
    w_desc = GluonTensorDescriptor.from_tensor(o.w_NP, [box_n, GROUP], layout)
    return x_desc, o.x_scale_MS, w_desc, o.w_scale, call.bias


def _gluon_constants(call: _Call) -> dict[str, int | bool]:
    kept = ("HAS_BIAS", "SILU_MUL", "SCALE_ROWS", "enable_fp_fusion")
    constants = call.constants()
    return {name: constants[name] for name in kept} | {"CHAIN": call.chain, "num_warps": 4}
