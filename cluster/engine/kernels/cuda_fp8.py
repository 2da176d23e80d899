"""FP8 layers on a Hopper GPU: weights, the choice of a kernel, and where activations are quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels import fp8
from cluster.engine.kernels.fp8 import Scaling
from cluster.engine.kernels.ops import LinearWeight
from cluster.engine.kernels.plan_admission import PlanAdmission
from cluster.engine.kernels.triton import fp8_launch
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan, unmeasured_plan
from cluster.engine.kernels.triton.fp8_table import load_fp8_plans
from cluster.engine.kernels.triton.fp8_trials import Fp8Trial
from cluster.errors import ConfigError
from cluster.gpu_share import library_serves


@dataclass(frozen=True, slots=True)
class CudaFp8Weight:
    """Dense (N, P) e4m3 rows, P = K filled up to a multiple of 128 with zeros, and their scales."""

    values_NP: torch.Tensor
    scale: torch.Tensor  # fp32, (N,) or (N / scale_rows, P / 128)
    in_features: int

    @property
    def out_features(self) -> int:
        return self.values_NP.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.values_NP.nbytes + self.scale.nbytes

    @property
    def scaling(self) -> Scaling:
        return Scaling.CHANNEL if self.scale.ndim == 1 else Scaling.BLOCK

    @property
    def scale_rows(self) -> int:
        """Rows that share a block scale; 0: each row has its own scale."""
        return 0 if self.scale.ndim == 1 else self.out_features // self.scale.shape[0]

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an embedding is never FP8")


class CudaFp8:
    """The FP8 part of `CudaOps`. Owns nothing but the plans of its device; `admission`: verdicts on them."""

    def __init__(self, device: torch.device, admission: PlanAdmission | None = None) -> None:
        self._device = device
        self.admission = admission or PlanAdmission(device)
        self._capability = torch.cuda.get_device_capability(device)
        self._library_serves = library_serves()
        self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.plans = load_fp8_plans(torch.cuda.get_device_name(device))

    def pack(self, values_NK: torch.Tensor, scale: torch.Tensor) -> CudaFp8Weight:
        """`Ops.pack_fp8`. Raises `ConfigError` on anything but Hopper: what decides the bits is
        how its `wgmma` accumulates e4m3."""
        if self._capability[0] != 9:
            capability = ".".join(map(str, self._capability))
            raise ConfigError(
                f"device: FP8 weights need compute capability 9.0 (H100, H200), {self._device} has {capability}; "
                "use a bf16 checkpoint and leave model.quantization out"
            )
        out_features, in_features = values_NK.shape
        values = torch.zeros(
            (out_features, fp8.padded_features(in_features)), dtype=torch.uint8, device=self._device
        )  # fmt: skip
        values[:, :in_features] = values_NK.view(torch.uint8).to(self._device)
        scale = scale.to(self._device, torch.float32).contiguous()
        return CudaFp8Weight(values.view(torch.float8_e4m3fn), scale, in_features)

    def linear(
        self, x: torch.Tensor, weight: CudaFp8Weight, bias_N: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype, device=x.device)
        is_plain = bias_N is None and out_dtype == torch.bfloat16 and weight.scaling is Scaling.CHANNEL
        takes_library = is_plain and self._library_serves
        plan = self.plans.linear(
            weight.out_features, weight.in_features, x.shape[0], silu_mul=False, takes_library=takes_library
        )
        self._serve_linear(self.quantized(x, weight), weight, bias_N, out, plan, silu_mul=False)
        return out

    def linear_silu_mul(self, x: torch.Tensor, gate_up: CudaFp8Weight, input_of: LinearWeight | None) -> torch.Tensor:
        features = gate_up.out_features // 2
        plan = self.plans.linear(features, gate_up.in_features, x.shape[0], silu_mul=True)
        if gate_up.scaling is Scaling.BLOCK and x.shape[0] > 64:  # the warp-group kernel does not fuse them
            plan = Fp8Plan(kind="separate")
        if plan.kind == "separate" and isinstance(input_of, CudaFp8Weight):
            return fp8_launch.silu_mul_quantize(self.linear(x, gate_up, None, torch.bfloat16), input_of.scaling)
        if plan.kind == "separate":
            plan = unmeasured_plan(x.shape[0])
        out = torch.empty((x.shape[0], features), dtype=torch.bfloat16, device=x.device)
        self._serve_linear(self.quantized(x, gate_up), gate_up, None, out, plan, silu_mul=True)
        return self.quantized(out, input_of)

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        update_TK: torch.Tensor | None,
        weight_K: torch.Tensor,
        eps: float,
        input_of: CudaFp8Weight,
    ) -> torch.Tensor:
        """The norm, with or without an update before it, quantised for `input_of`."""
        return fp8_launch.rms_norm_quantize(x_TK, update_TK, weight_K, eps, input_of.scaling)

    def quantized(self, x: torch.Tensor, weight: LinearWeight | None) -> torch.Tensor:
        """As `weight` reads it."""
        if not isinstance(weight, CudaFp8Weight) or fp8.is_quantized(x):
            return x
        return fp8_launch.quantize(x, weight.scaling)

    def _serve_linear(
        self,
        rows_TB: torch.Tensor,
        weight: CudaFp8Weight,
        bias_N: torch.Tensor | None,
        out_TN: torch.Tensor,
        plan: Fp8Plan,
        *,
        silu_mul: bool,
    ) -> None:
        """`plan`, or what is admitted in its place."""
        num_rows = rows_TB.shape[0]
        if num_rows == 0:
            return

        def run(rows_TB: torch.Tensor, out_TN: torch.Tensor, plan: Fp8Plan) -> None:
            self.run_linear(rows_TB, weight, bias_N, out_TN, plan, silu_mul=silu_mul)

        shape = (weight.out_features, weight.in_features)
        call = ("fp8", shape, weight.scale_rows, bias_N is None, num_rows, out_TN.dtype, silu_mul, plan)
        plan = self.admission.serving(
            call, plan,
            lambda: Fp8Trial(
                run, shape, weight.scaling, weight.scale_rows, bias_N is not None, num_rows, out_TN.dtype, silu_mul,
                self._device,
            ),
        )  # fmt: skip
        run(rows_TB, out_TN, plan)

    def run_linear(
        self,
        rows_TB: torch.Tensor,
        weight: CudaFp8Weight,
        bias_N: torch.Tensor | None,
        out_TN: torch.Tensor,
        plan: Fp8Plan,
        *,
        silu_mul: bool,
        promote: bool = True,
        chain: int = fp8.CHANNEL_CHAIN,
    ) -> None:
        """One plan on quantised rows into a given result; what the tuner and the tests call too. Not admitted."""
        if rows_TB.shape[0] == 0:
            return
        x_TP, x_scale_TS = fp8.split_rows(rows_TB, weight.in_features, weight.scaling)
        if plan.kind == "library":
            is_plain = bias_N is None and not silu_mul and out_TN.dtype == torch.bfloat16 and chain == 1
            if is_plain and weight.scaling is Scaling.CHANNEL:
                library_linear(x_TP, x_scale_TS, weight, out_TN)
                return
            plan = unmeasured_plan(rows_TB.shape[0])  # admitted for the bare product only
        operands = fp8_launch.Fp8Operands(x_TP, x_scale_TS, weight.values_NP, weight.scale, weight.scale_rows)
        fp8_launch.run_linear(
            operands, bias_N, out_TN, plan,
            silu_mul=silu_mul, num_programs=self._num_multiprocessors, promote=promote, chain=chain,
        )  # fmt: skip


def library_linear(
    x_TP: torch.Tensor,
    x_scale_TS: torch.Tensor,
    weight: CudaFp8Weight,
    out_TN: torch.Tensor,
    *,
    use_fast_accum: bool = False,
) -> None:
    """torch's product of rows and channels with their scales; N a multiple of 16. Raises RuntimeError if the
    library has no kernel. `use_fast_accum` leaves sums in the tensor core: to be measured, never admitted."""
    torch._scaled_mm(
        x_TP, weight.values_NP.t(), scale_a=x_scale_TS.contiguous(), scale_b=weight.scale[None, :],
        out_dtype=out_TN.dtype, use_fast_accum=use_fast_accum, out=out_TN,
    )  # fmt: skip
