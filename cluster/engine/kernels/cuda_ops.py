"""Operations on an NVIDIA GPU: Triton kernels, and cuBLASLt without split-K, by plans whose bits were admitted.

Nothing here waits for the device, but the first call that wants a plan (`plan_admission.py`), and every choice of a
kernel depends on shapes known on the host, so a step can be captured into a CUDA graph; kernels are then chosen at
capture, per batch size.
"""

from __future__ import annotations

from functools import partial

import torch

from cluster.engine.kernels import cuda_plans
from cluster.engine.kernels.cuda_fp8 import CudaFp8, CudaFp8Weight
from cluster.engine.kernels.cuda_weights import CudaExpertWeight, CudaHeadWeight, CudaLinearWeight
from cluster.engine.kernels.ops import (
    AttentionMetadata,
    ExpertChoice,
    ExpertWeight,
    GroupedRouting,
    HeadWeight,
    LinearWeight,
    Rotation,
)
from cluster.engine.kernels.plan_admission import PlanAdmission
from cluster.engine.kernels.triton import attention_launch, latent_launch, launch, moe_launch
from cluster.engine.kernels.triton.moe_plans import MoePlan, MoeShape, load_moe_plan_index
from cluster.engine.kernels.triton.plans import AttentionPlan, LatentPlan, LinearPlan
from cluster.engine.kernels.triton.table import load_plan_index, plan_without_library, unmeasured_plan
from cluster.gpu_share import library_serves

_MAX_OVERLAPPED_ROWS = 512


class CudaOps:
    """`Ops` for one CUDA device. Sets torch's process-wide cuBLAS switches: no split-K, ever.

    `pdl`: kernels are set up while their predecessors still run (values in `triton/overlap.py`).
    """

    def __init__(self, device: torch.device, *, residual_dtype: torch.dtype = torch.bfloat16, pdl: int = True) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self.name: str = f"cuda:sm{major}{minor}"
        self.device: torch.device = device
        self.residual_dtype: torch.dtype = residual_dtype
        self.plans = load_plan_index(torch.cuda.get_device_name(device))
        self.pdl = pdl
        self.admission = PlanAdmission(device)
        self._library_serves = library_serves()
        self._lists = attention_launch.WorkLists()
        self.moe_plans = load_moe_plan_index(torch.cuda.get_device_name(device))
        self.latent_plan = LatentPlan()
        self.fp8 = CudaFp8(device, self.admission)
        self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)

    def _pdl(self, rows: torch.Tensor) -> int:
        """Kernels of many rows gain nothing from it and lose 1 % (prefill of an 8B shape, H100)."""
        return self.pdl if len(rows) <= _MAX_OVERLAPPED_ROWS else 0

    def pack_linear(self, weight_NK: torch.Tensor) -> CudaLinearWeight:
        weight = weight_NK.to(self.device).contiguous()
        return CudaLinearWeight(weight if weight.data_ptr() % 16 == 0 else weight.clone())

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> CudaFp8Weight:
        return self.fp8.pack(values_NK, scale)

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        if isinstance(weight, CudaFp8Weight):
            return self.fp8.linear(x_TK, weight, bias_N, out_dtype)
        out = torch.empty((x_TK.shape[0], weight.out_features), dtype=out_dtype, device=x_TK.device)
        plan = self.plans.linear(weight.out_features, weight.in_features, x_TK.shape[0], silu_mul=False)
        self._serve_linear(x_TK, weight, bias_N, out, plan, silu_mul=False)
        return out

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        if isinstance(gate_up, CudaFp8Weight):
            return self.fp8.linear_silu_mul(x_TK, gate_up, input_of)
        features = gate_up.out_features // 2
        out = torch.empty((x_TK.shape[0], features), dtype=torch.bfloat16, device=x_TK.device)
        plan = self.plans.linear(features, gate_up.in_features, x_TK.shape[0], silu_mul=True)
        self._serve_linear(x_TK, gate_up, None, out, plan, silu_mul=True)
        return self.fp8.quantized(out, input_of)

    def run_linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None,
        out_TN: torch.Tensor,
        plan: LinearPlan,
        *,
        silu_mul: bool,
    ) -> None:
        """One plan into a given result, for the tuner and the tests. Only the library's products are compared."""
        if plan.kind == "cublaslt":
            self._serve_linear(x_TK, weight, bias_N, out_TN, plan, silu_mul=silu_mul)
        else:
            self._launch_linear(x_TK, out_TN, plan, weight=weight, bias_N=bias_N, silu_mul=silu_mul)

    def _serve_linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None,
        out_TN: torch.Tensor,
        plan: LinearPlan,
        *,
        silu_mul: bool,
    ) -> None:
        """`plan`, or what is admitted in its place."""
        assert isinstance(weight, CudaLinearWeight)
        num_rows = x_TK.shape[0]
        if num_rows == 0:
            return
        has_epilogue = bias_N is not None or silu_mul  # the library has none
        if plan.kind == "cublaslt" and (
            has_epilogue or not self._library_serves or not launch.library_takes(weight.weight_NK)
        ):
            plan = plan_without_library(num_rows)
        launch_plan = partial(self._launch_linear, weight=weight, bias_N=bias_N, silu_mul=silu_mul)
        plan = cuda_plans.linear_plan(
            self.admission, launch_plan, weight.weight_NK, bias_N, num_rows, out_TN.dtype, plan, silu_mul=silu_mul
        )
        launch_plan(x_TK, out_TN, plan)

    def _launch_linear(
        self,
        x_TK: torch.Tensor,
        out_TN: torch.Tensor,
        plan: LinearPlan,
        *,
        weight: LinearWeight,
        bias_N: torch.Tensor | None,
        silu_mul: bool,
    ) -> None:
        assert isinstance(weight, CudaLinearWeight)
        if x_TK.shape[0] == 0:
            return
        if plan.kind == "cublaslt":
            launch.run_library_linear(x_TK, weight.weight_NK, out_TN)
            return
        launch.run_linear(
            launch.aligned(x_TK), weight.weight_NK, bias_N, out_TN, plan,
            silu_mul=silu_mul, num_programs=self._num_multiprocessors, pdl=self._pdl(x_TK),
        )  # fmt: skip

    def embedding(self, token_ids_T: torch.Tensor, table_VK: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(token_ids_T, table_VK).to(self.residual_dtype)

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        if isinstance(input_of, CudaFp8Weight):
            return self.fp8.rms_norm(x_TK, None, weight_K, eps, input_of)
        return launch.run_rms_norm(x_TK, None, weight_K, eps, out_dtype, pdl=self._pdl(x_TK))

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        if isinstance(input_of, CudaFp8Weight):
            return self.fp8.rms_norm(residual_TK, update_TK, weight_K, eps, input_of)
        return launch.run_rms_norm(residual_TK, update_TK, weight_K, eps, torch.bfloat16, pdl=self._pdl(residual_TK))

    def rope_and_cache(
        self,
        qkv_TC: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PD: torch.Tensor,
        num_heads: int,
        q_norm_D: torch.Tensor | None = None,
        k_norm_D: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        return launch.run_rope_and_cache(
            qkv_TC, kv_N2GSD, metadata, cos_sin_PD, num_heads, q_norm_D, k_norm_D, norm_eps, pdl=self._pdl(qkv_TC)
        )

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        def run(
            q_THD: torch.Tensor, kv_N2GSD: torch.Tensor, metadata: AttentionMetadata, plan: AttentionPlan
        ) -> torch.Tensor:
            return attention_launch.run_attention(
                q_THD, kv_N2GSD, metadata, scale, plan, self._num_multiprocessors, window=window,
                pdl=self._pdl(q_THD), lists=self._lists,
            )  # fmt: skip

        plan = self.plans.attention
        if q_THD.shape[0]:
            plan = cuda_plans.attention_plan(self.admission, run, q_THD, kv_N2GSD, metadata, window, plan)
        return run(q_THD, kv_N2GSD, metadata, plan)

    def rope_attention(
        self,
        qkv_TC: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        rotation: Rotation,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        def run(
            qkv_TC: torch.Tensor,
            kv_N2GSD: torch.Tensor,
            metadata: AttentionMetadata,
            rotation: Rotation,
            plan: AttentionPlan,
        ) -> torch.Tensor:
            return attention_launch.run_rope_attention(
                qkv_TC, kv_N2GSD, metadata, rotation, scale, plan, self._num_multiprocessors, window=window,
                pdl=self._pdl(qkv_TC), lists=self._lists,
            )  # fmt: skip

        plan = self.plans.attention
        if len(qkv_TC) and attention_launch.takes_rope(plan, metadata, rotation):
            plan = cuda_plans.rope_attention_plan(
                self.admission, run, qkv_TC, kv_N2GSD, metadata, rotation, window, plan
            )  # fmt: skip
            if plan.split_rope_up_to:
                return run(qkv_TC, kv_N2GSD, metadata, rotation, plan)
        q_THD = self.rope_and_cache(qkv_TC, kv_N2GSD, metadata, *rotation)
        return self.attention(q_THD, kv_N2GSD, metadata, scale, window=window)

    def pack_heads(self, weight_HNK: torch.Tensor) -> CudaHeadWeight:
        return CudaHeadWeight(launch.aligned(weight_HNK.to(self.device)))

    def head_linear(self, x_THK: torch.Tensor, weight: HeadWeight) -> torch.Tensor:
        assert isinstance(weight, CudaHeadWeight)

        def run(x_THK: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
            return latent_launch.run_head_linear(x_THK, weight.weight_HNK, plan, pdl=self._pdl(x_THK))

        plan = unmeasured_plan(len(x_THK))
        if len(x_THK):
            plan = cuda_plans.head_plan(self.admission, run, weight.weight_HNK, len(x_THK), plan)
        return run(x_THK, plan)

    def latent_rope_and_cache(
        self,
        q_TC: torch.Tensor,
        row_TD: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PR: torch.Tensor,
        num_heads: int,
        norm_L: torch.Tensor,
        norm_eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return latent_launch.run_latent_rope_and_cache(
            q_TC, row_TD, kv_N11SD, metadata, cos_sin_PR, num_heads, norm_L, norm_eps, pdl=self._pdl(q_TC)
        )

    def latent_attention(
        self,
        q_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        def run(
            q_THL: torch.Tensor,
            q_rope_THR: torch.Tensor,
            kv_N11SD: torch.Tensor,
            metadata: AttentionMetadata,
            plan: LatentPlan,
        ) -> torch.Tensor:
            return latent_launch.run_latent_attention(
                q_THL, q_rope_THR, kv_N11SD, metadata, scale, plan, self._num_multiprocessors,
                pdl=self._pdl(q_THL), lists=self._lists,
            )  # fmt: skip

        plan = self.latent_plan
        if len(q_THL):
            plan = cuda_plans.latent_plan(self.admission, run, q_THL, kv_N11SD, metadata, plan)
        return run(q_THL, q_rope_THR, kv_N11SD, metadata, plan)

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maximum, logsumexp, _ = self.vocab_stats(logits_TV)
        return maximum, logsumexp

    def vocab_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(max, logsumexp, argmax) of `log_softmax_stats` and `argmax`, from one pass over the logits."""
        return launch.run_vocab_stats(logits_TV, pdl=self._pdl(logits_TV))

    def softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        _, logsumexp, _ = self.vocab_stats(logits_TV)
        return torch.exp(logits_TV - logsumexp[:, None])

    def argmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        return self.vocab_stats(logits_TV)[2]

    def pack_experts(self, weight_ENK: torch.Tensor) -> CudaExpertWeight:
        weight = weight_ENK.to(self.device).contiguous()
        return CudaExpertWeight(weight if weight.data_ptr() % 16 == 0 else weight.clone())

    def moe_route(self, logits_TE: torch.Tensor, top_k: int, *, renormalise: bool) -> ExpertChoice:
        return ExpertChoice(*moe_launch.run_route(logits_TE, top_k, renormalise=renormalise, pdl=self._pdl(logits_TE)))

    def moe_route_grouped(
        self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: GroupedRouting
    ) -> ExpertChoice:
        return ExpertChoice(*moe_launch.run_route_grouped(logits_TE, bias_E, routing, pdl=self._pdl(logits_TE)))

    def moe_experts(
        self,
        x_TK: torch.Tensor,
        experts_TJ: torch.Tensor,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        *,
        first_expert: int = 0,
        plan: MoePlan | None = None,
    ) -> torch.Tensor:
        """`plan`: for the tuner and the tests, instead of the one the table has."""
        assert isinstance(gate_up, CudaExpertWeight)
        assert isinstance(down, CudaExpertWeight)
        gate_up_ENK, down_EKF = gate_up.weight_ENK, down.weight_ENK

        def run(x_TK: torch.Tensor, experts_TJ: torch.Tensor, plan: MoePlan) -> torch.Tensor:
            return moe_launch.run_experts(
                x_TK, experts_TJ, gate_up_ENK, down_EKF, plan, first_expert=first_expert,
                num_programs=self._num_multiprocessors, out_dtype=self.residual_dtype, pdl=self._pdl(x_TK),
            )  # fmt: skip

        if plan is None:
            num_rows, top_k = experts_TJ.shape
            num_experts, hidden, features = down_EKF.shape
            shape = MoeShape(num_experts=num_experts, top_k=top_k, hidden=hidden, features=features)
            plan = self.moe_plans.plan(shape, num_rows)
            if num_rows:
                plan = cuda_plans.experts_plan(self.admission, run, x_TK, shape, first_expert, plan)
        return run(x_TK, experts_TJ, plan)

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        return moe_launch.run_combine(rows_TJK, weights_TJ, self.residual_dtype, pdl=self._pdl(rows_TJK))
