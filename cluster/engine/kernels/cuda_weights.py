"""Weights as the kernels of `cuda_ops.py` read them. FP8: `cuda_fp8.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CudaLinearWeight:
    """A dense row-major (N, K) weight, 16-byte aligned: what every GEMM here reads."""

    weight_NK: torch.Tensor

    @property
    def out_features(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_NK.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.weight_NK.numel() * self.weight_NK.element_size()

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        return self.weight_NK.index_select(0, indices_T)


@dataclass(frozen=True, slots=True)
class CudaExpertWeight:
    """Dense row-major (E, N, K) weights, 16-byte aligned."""

    weight_ENK: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.weight_ENK.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight_ENK.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight_ENK.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.weight_ENK.nbytes


@dataclass(frozen=True, slots=True)
class CudaHeadWeight:
    """Dense row-major (H, N, K) weights, 16-byte aligned."""

    weight_HNK: torch.Tensor

    @property
    def num_heads(self) -> int:
        return self.weight_HNK.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight_HNK.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight_HNK.shape[2]
