"""Latent attention on a CPU, in terms of the class's `linear` and `rms_norm`.

Shared by the reference and the native operations, which bring the arithmetic. There is no kernel of its own:
scores and weighted values are chains as any product's, so an admitted `linear` computes them, and what lies
between is slow torch. It is here so that such models run where there is no GPU, in tests above all.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from cluster.engine.kernels.cpu.arithmetic import SPLIT
from cluster.engine.kernels.cpu.attend import Split, merge, rotate, split_weights
from cluster.engine.kernels.ops import AttentionMetadata, HeadWeight, LinearWeight, Ops


class PackedHeads:
    """One packed weight per head."""

    __slots__ = ("heads",)

    def __init__(self, heads: list[LinearWeight]) -> None:
        self.heads = heads

    @property
    def num_heads(self) -> int:
        return len(self.heads)

    @property
    def out_features(self) -> int:
        return self.heads[0].out_features

    @property
    def in_features(self) -> int:
        return self.heads[0].in_features


class LatentLoop:
    """The operations of latent attention."""

    def pack_heads(self: Ops, weight_HNK: torch.Tensor) -> PackedHeads:
        return PackedHeads([self.pack_linear(weight_NK) for weight_NK in weight_HNK])

    def head_linear(self: Ops, x_THK: torch.Tensor, weight: HeadWeight) -> torch.Tensor:
        assert isinstance(weight, PackedHeads)
        heads = [self.linear(x_THK[:, index].contiguous(), head) for index, head in enumerate(weight.heads)]
        return torch.stack(heads, dim=1)

    def latent_rope_and_cache(
        self: Ops,
        q_TC: torch.Tensor,
        row_TD: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PR: torch.Tensor,
        num_heads: int,
        norm_L: torch.Tensor,
        norm_eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        block_size = kv_N11SD.shape[3]
        latent_size, rope_size = len(norm_L), cos_sin_PR.shape[1]
        assert row_TD.shape[1] == kv_N11SD.shape[4] == latent_size + rope_size
        q_THC = q_TC.float().view(len(q_TC), num_heads, -1)
        cos_sin_TR = cos_sin_PR[metadata.positions]
        latent_TL = self.rms_norm(row_TD[:, :latent_size].contiguous(), norm_L, norm_eps)
        turned_TR = rotate(row_TD[:, None, latent_size:].float(), cos_sin_TR)[:, 0].bfloat16()
        is_stored = metadata.slot_mapping >= 0
        slots = metadata.slot_mapping[is_stored]
        stored_TD = torch.cat([latent_TL, turned_TR], dim=1)[is_stored]
        kv_N11SD[slots // block_size, 0, 0, slots % block_size] = stored_TD
        return q_THC[:, :, :-rope_size].bfloat16(), rotate(q_THC[:, :, -rope_size:], cos_sin_TR).bfloat16()

    def latent_attention(
        self: Ops,
        q_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        out_THL = torch.zeros_like(q_THL)  # padding rows stay 0
        q_THD = torch.cat([q_THL, q_rope_THR], dim=2)
        block_size = kv_N11SD.shape[3]
        for sequence, (first, last) in enumerate(pairwise(metadata.query_start.tolist())):
            if first == last:
                continue
            context_len = int(metadata.context_len[sequence])
            blocks = metadata.block_table[sequence, : -(-context_len // block_size)].long()
            rows_CD = kv_N11SD[blocks, 0, 0].flatten(0, 1)[:context_len]
            first_position = context_len - (last - first)
            q_RHD, values_CL = q_THD[first:last], rows_CD[:, : q_THL.shape[2]]
            if last - first > 1 and not values_CL[first_position:].isfinite().all():
                # 0 * inf is NaN: a row must not meet the values of later positions, not even with weight 0.
                for index, q_HD in enumerate(q_RHD):
                    seen_CD = rows_CD[: first_position + index + 1]
                    out_THL[first + index] = _attend(self, q_HD[None], seen_CD, out_THL.shape[2], scale)[0]
                continue
            out_THL[first:last] = _attend(self, q_RHD, rows_CD, out_THL.shape[2], scale)
        return out_THL


def _attend(ops: Ops, q_RHD: torch.Tensor, rows_CD: torch.Tensor, latent_size: int, scale: float) -> torch.Tensor:
    """(R, H, L) of the rows at the last R of C positions."""
    num_rows, num_heads, _ = q_RHD.shape
    q_QD = q_RHD.flatten(0, 1).contiguous()
    positions_Q1 = torch.arange(len(rows_CD) - num_rows, len(rows_CD)).repeat_interleave(num_heads)[:, None]
    folded: Split | None = None
    for start in range(0, len(rows_CD), SPLIT):
        keys_CD = rows_CD[start : start + SPLIT].contiguous()
        is_visible = torch.arange(start, start + len(keys_CD)) <= positions_Q1
        scores = ops.linear(q_QD, ops.pack_linear(keys_CD), out_dtype=torch.float32) * scale
        best, total, weights = split_weights(scores, is_visible)
        values = ops.pack_linear(keys_CD[:, :latent_size].t())
        # + 0 turns -0 into +0: a row must not show how many masked keys followed in its tile.
        weighted = ops.linear(weights.bfloat16(), values, out_dtype=torch.float32) + 0.0
        part = (best, total, weighted)
        if folded is None:
            folded = part
            continue
        reaches = positions_Q1 >= start
        pairs = zip(merge(folded, part), folded, strict=True)
        best, total, weighted = (torch.where(reaches, new, old) for new, old in pairs)
        folded = (best, total, weighted)
    assert folded is not None
    return (folded[2] / folded[1]).bfloat16().view(num_rows, num_heads, latent_size)
