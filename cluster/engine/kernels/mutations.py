"""Kernels broken on purpose, so that tests of exactness can show that they would notice.

`TANDEM_BREAK_KERNEL=<name>` in a process's environment makes `get_ops` return a mutant, after admission
(which would refuse it) and with a warning. Every mutant is the kind of bug that happens: a single row
gets a kernel of its own that is just as accurate, with another order of the sum.
"""

from __future__ import annotations

import logging

import torch

from cluster.engine.kernels.composed import DelegatingOps
from cluster.engine.kernels.ops import AttentionMetadata, HeadWeight, LinearWeight, Ops
from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

BREAK_VARIABLE = "TANDEM_BREAK_KERNEL"


class _TwoOrders:
    """A weight packed as it is, and with K reversed."""

    def __init__(self, forward: LinearWeight, backward: LinearWeight) -> None:
        self.forward, self.backward = forward, backward
        self.out_features, self.in_features, self.num_bytes = (
            forward.out_features,
            forward.in_features,
            forward.num_bytes,
        )

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        return self.forward.rows(indices_T)


class ReversedSingleRowLinear(DelegatingOps):
    """`linear` sums K downwards when there is one row. FP8 layers are left alone."""

    def pack_linear(self, weight_NK: torch.Tensor) -> LinearWeight:
        return _TwoOrders(super().pack_linear(weight_NK), super().pack_linear(weight_NK.flip(1)))

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        if not isinstance(weight, _TwoOrders):
            return super().linear(x_TK, weight, bias_N, out_dtype=out_dtype)
        if x_TK.shape[0] == 1:
            return super().linear(x_TK.flip(1).contiguous(), weight.backward, bias_N, out_dtype=out_dtype)
        return super().linear(x_TK, weight.forward, bias_N, out_dtype=out_dtype)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        inner = gate_up.forward if isinstance(gate_up, _TwoOrders) else gate_up
        return super().linear_silu_mul(x_TK, inner, input_of=input_of)


class UnsplitSingleRowAttention(DelegatingOps):
    """Attention of a sequence with one row sums all keys at once, in float64: better, and different.

    Layers with a window are left alone.
    """

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        out_TC = super().attention(q_THD, kv_N2GSD, metadata, scale, window=window)
        if window is not None:
            return out_TC
        starts = metadata.query_start.tolist()
        for sequence, context_len in enumerate(metadata.context_len.tolist()):
            if starts[sequence + 1] - starts[sequence] != 1:
                continue
            num_blocks = -(-context_len // kv_N2GSD.shape[3])
            blocks = metadata.block_table[sequence, :num_blocks].long()
            keys, values = kv_N2GSD[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len].double()
            q_GRD = q_THD[starts[sequence]].double().view(keys.shape[0], -1, keys.shape[2])
            weights = torch.softmax(q_GRD @ keys.transpose(1, 2) * scale, dim=-1)
            out_TC[starts[sequence]] = (weights @ values).flatten().to(out_TC.dtype)
        return out_TC


class WiderSingleRowWindow(DelegatingOps):
    """In a step of single rows, as decoding has them, a sliding window holds one key too many."""

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        if window is not None and metadata.num_rows_max == 1:
            window += 1
        return super().attention(q_THD, kv_N2GSD, metadata, scale, window=window)


class UnsplitSingleRowLatentAttention(DelegatingOps):
    """Latent attention of a sequence with one row sums all keys at once, in float64: better, and different."""

    def latent_attention(
        self,
        q_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        out_THL = super().latent_attention(q_THL, q_rope_THR, kv_N11SD, metadata, scale)
        starts = metadata.query_start.tolist()
        for sequence, context_len in enumerate(metadata.context_len.tolist()):
            if starts[sequence + 1] - starts[sequence] != 1:
                continue
            row, num_blocks = starts[sequence], -(-context_len // kv_N11SD.shape[3])
            blocks = metadata.block_table[sequence, :num_blocks].long()
            rows_CD = kv_N11SD[blocks, 0, 0].flatten(0, 1)[:context_len].double()
            q_HD = torch.cat([q_THL[row], q_rope_THR[row]], dim=1).double()
            weights_HC = torch.softmax(q_HD @ rows_CD.t() * scale, dim=-1)
            out_THL[row] = (weights_HC @ rows_CD[:, : q_THL.shape[2]]).to(out_THL.dtype)
        return out_THL


class SplitSingleRowHeadLinear(DelegatingOps):
    """`head_linear` of a single row adds two chains, each over a half of K."""

    def pack_heads(self, weight_HNK: torch.Tensor) -> HeadWeight:
        half = weight_HNK.shape[2] // 2
        halves = weight_HNK[:, :, :half].contiguous(), weight_HNK[:, :, half:].contiguous()
        return _TwoHalves(super().pack_heads(weight_HNK), *map(super().pack_heads, halves))

    def head_linear(self, x_THK: torch.Tensor, weight: HeadWeight) -> torch.Tensor:
        assert isinstance(weight, _TwoHalves)
        if x_THK.shape[0] != 1:
            return super().head_linear(x_THK, weight.whole)
        first, second = torch.split(x_THK, [weight.first.in_features, weight.second.in_features], dim=2)
        low = super().head_linear(first.contiguous(), weight.first)
        return low + super().head_linear(second.contiguous(), weight.second)


class _TwoHalves:
    """Heads' weights packed as they are, and each half of K."""

    def __init__(self, whole: HeadWeight, first: HeadWeight, second: HeadWeight) -> None:
        self.whole, self.first, self.second = whole, first, second
        self.num_heads, self.out_features, self.in_features = whole.num_heads, whole.out_features, whole.in_features


class RankOrderSingleRowCombine(DelegatingOps):
    """A single row's experts are added by falling weight instead of by index."""

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        if rows_TJK.shape[0] == 1:
            order_J = weights_TJ[0].argsort(descending=True)
            rows_TJK, weights_TJ = rows_TJK[:, order_J], weights_TJ[:, order_J]
        return super().moe_combine(rows_TJK, weights_TJ)


MUTANTS = {
    "linear": ReversedSingleRowLinear,
    "attention": UnsplitSingleRowAttention,
    "window": WiderSingleRowWindow,
    "moe": RankOrderSingleRowCombine,
    "latent": UnsplitSingleRowLatentAttention,
    "head_linear": SplitSingleRowHeadLinear,
}


def break_kernel(ops: Ops, name: str) -> Ops:
    """The mutant called `name`. Raises `ConfigError` if there is none."""
    if name not in MUTANTS:
        raise ConfigError(f"{BREAK_VARIABLE}={name!r} is unknown. Known: {', '.join(MUTANTS)}")
    logger.warning("%s=%s: results will depend on the batch. For tests only.", BREAK_VARIABLE, name)
    return MUTANTS[name](ops)
