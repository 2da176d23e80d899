"""Multi-head latent attention (arXiv:2405.04434), always in its absorbed form.

Shape legend: T rows of the step, H query heads of this rank, U and R a query head's parts without and with
rotation, L size of the latent row, V value size.

    q      = [q_nope (H, U) | q_rope (H, R)]     of the hidden state, directly or through a narrow normalised row
    row    = [norm(latent) (L) | rotated (R)]    one per token, cached; every rank holds all of it
    q_L    = W_UK q_nope                         (H, L): queries against latent rows
    mixed  = W_UV attention(q_L, q_rope, rows)   (H, V)

Keys and values per head are never made, so a prompt's rows and a decoded one go the same way and position i
has one value however it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import AttentionMetadata, HeadWeight, LinearWeight, Ops

NORM_EPS = 1e-6  # of the norms in here: fixed in the published models, whatever `rms_norm_eps` says


@dataclass(frozen=True, slots=True)
class NarrowQueries:
    """Queries made through a row of `q_lora_rank` numbers, which is whole on every rank."""

    norm_Q: torch.Tensor
    widen: LinearWeight  # (H * (U + R), Q)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's weights on one rank, beside the layer's `qkv`, whose rows are [queries, or the narrow row; the
    row to be cached], and its `output`."""

    queries: NarrowQueries | None  # None: `qkv` has the queries themselves
    cache_norm_L: torch.Tensor
    into_latent: HeadWeight  # W_UK: (L, U) of each head
    out_of_latent: HeadWeight  # W_UV: (V, L) of each head

    def mix(
        self,
        qkv_TC: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        rope_table_PR: torch.Tensor,
        scale: float,
        ops: Ops,
    ) -> torch.Tensor:
        """(T, H * V) bf16."""
        row_size = kv_N11SD.shape[4]
        q_TC, row_TD = torch.split(qkv_TC, [qkv_TC.shape[1] - row_size, row_size], dim=1)
        q_THU, q_rope_THR = ops.latent_rope_and_cache(
            self._queries(q_TC, ops), row_TD, kv_N11SD, metadata, rope_table_PR, self.into_latent.num_heads,
            self.cache_norm_L, NORM_EPS,
        )  # fmt: skip
        q_THL = ops.head_linear(q_THU, self.into_latent)
        attended_THL = ops.latent_attention(q_THL, q_rope_THR, kv_N11SD, metadata, scale)
        return ops.head_linear(attended_THL, self.out_of_latent).flatten(1)

    def warm_up(self, num_rows: int, ops: Ops) -> None:
        """Use the products of a step of that size, on inputs of no meaning."""
        if self.queries is not None:
            zeros_TQ = torch.zeros((num_rows, self.queries.widen.in_features), device=ops.device)
            self._queries(zeros_TQ, ops)
        for weight in (self.into_latent, self.out_of_latent):
            shape = (num_rows, weight.num_heads, weight.in_features)
            ops.head_linear(torch.zeros(shape, dtype=torch.bfloat16, device=ops.device), weight)

    def _queries(self, q_TC: torch.Tensor, ops: Ops) -> torch.Tensor:
        if self.queries is None:
            return q_TC
        normed_TQ = ops.rms_norm(q_TC.contiguous(), self.queries.norm_Q, NORM_EPS)
        return ops.linear(normed_TQ, self.queries.widen, out_dtype=torch.float32)
