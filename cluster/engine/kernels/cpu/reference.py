"""Every operation written in `arithmetic.py`: the definition of right, and the fallback when a machine
has no compiler. Slow, and row-invariant by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cluster.engine.kernels.cpu.arithmetic import SPLIT, InstructionClass, dot_chain, exp, row_sum, silu_mul, sqrt
from cluster.engine.kernels.cpu.attend import Split, merge, rotate, split_weights
from cluster.engine.kernels.cpu.latent import LatentLoop
from cluster.engine.kernels.cpu.moe import ExpertLoop
from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight, TwoStepAttention


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    """The weight as it came."""

    weight_NK: torch.Tensor

    @property
    def out_features(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_NK.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.weight_NK.nbytes

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        return self.weight_NK[indices_T]


class ReferenceOps(ExpertLoop, LatentLoop, TwoStepAttention):
    """The operations of `Ops` for one instruction class, one rounding at a time."""

    residual_dtype = torch.float32

    def __init__(self, instructions: InstructionClass) -> None:
        self.instructions = instructions
        self.name = f"cpu:{instructions.value}"
        self.device = torch.device("cpu")

    def pack_linear(self, weight_NK: torch.Tensor) -> ReferenceWeight:
        return ReferenceWeight(weight_NK.to(torch.bfloat16).contiguous())

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> LinearWeight:
        raise NotImplementedError("FP8 layers are CpuFp8Ops' business")

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        assert isinstance(weight, ReferenceWeight)
        y_TN = dot_chain(x_TK, weight.weight_NK, self.instructions)
        if bias_N is not None:
            y_TN = y_TN + bias_N.float()
        return y_TN.to(out_dtype)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        gate, up = self.linear(x_TK, gate_up, out_dtype=torch.float32).chunk(2, dim=1)
        return silu_mul(gate, up).bfloat16()

    def embedding(self, token_ids_T: torch.Tensor, table_VK: torch.Tensor) -> torch.Tensor:
        return table_VK[token_ids_T].float()

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        return _normalise(x_TK.float(), weight_K, eps).to(out_dtype)

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        residual_TK += update_TK.float()
        return self.rms_norm(residual_TK, weight_K, eps)

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
        num_kv_heads, block_size, head_size = kv_N2GSD.shape[2:]
        heads_THD = qkv_TC.float().view(len(qkv_TC), -1, head_size)
        q, k, v = torch.split(heads_THD, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm_D is not None:
            q = _normalise(q.flatten(0, 1), q_norm_D, norm_eps).view_as(q)
        if k_norm_D is not None:
            k = _normalise(k.flatten(0, 1), k_norm_D, norm_eps).view_as(k)
        cos_sin = cos_sin_PD[metadata.positions]
        q, k = rotate(q, cos_sin).bfloat16(), rotate(k, cos_sin).bfloat16()
        is_stored = metadata.slot_mapping >= 0
        slots = metadata.slot_mapping[is_stored]
        blocks, offsets = slots // block_size, slots % block_size
        kv_N2GSD[blocks, 0, :, offsets] = k[is_stored]
        kv_N2GSD[blocks, 1, :, offsets] = v[is_stored].bfloat16()
        return q

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        out_THD = torch.zeros_like(q_THD)
        block_size = kv_N2GSD.shape[3]
        starts = metadata.query_start.tolist()
        for sequence, context_len in enumerate(metadata.context_len.tolist()):
            first, last = starts[sequence], starts[sequence + 1]
            if first == last:
                continue
            blocks = metadata.block_table[sequence, : -(-context_len // block_size)].long()
            keys, values = kv_N2GSD[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len]
            first_position = context_len - (last - first)
            out_THD[first:last] = self._attend_sequence(
                q_THD[first:last], keys, values, first_position, scale, window or context_len
            )
        return out_THD.flatten(1, 2)

    def _attend_sequence(
        self,
        q_THD: torch.Tensor,
        keys_GCD: torch.Tensor,
        values_GCD: torch.Tensor,
        first: int,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """Rows at positions first, first + 1 ...; C keys, the last row is at the position of the last one."""
        last_window = max(0, keys_GCD.shape[1] - window)
        if values_GCD[:, :last_window].isfinite().all() and values_GCD[:, first + 1 :].isfinite().all():
            return self._attend_rows(q_THD, keys_GCD, values_GCD, first, scale, window)
        # 0 * inf is NaN: a row must not meet the values of positions it does not see, not even with weight 0.
        rows = []
        for p, q in enumerate(q_THD, start=first):
            values = values_GCD[:, : p + 1].clone()
            values[:, : max(0, p + 1 - window)] = 0
            rows.append(self._attend_rows(q[None], keys_GCD[:, : p + 1], values, p, scale, window))
        return torch.cat(rows)

    def _attend_rows(
        self,
        q_THD: torch.Tensor,
        keys_GCD: torch.Tensor,
        values_GCD: torch.Tensor,
        first: int,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        num_rows, num_heads, _ = q_THD.shape
        heads_per_kv_head = num_heads // len(keys_GCD)
        positions = torch.arange(first, first + num_rows).repeat_interleave(heads_per_kv_head)
        out = []
        for kv_head, (keys, values) in enumerate(zip(keys_GCD, values_GCD, strict=True)):
            heads = q_THD[:, kv_head * heads_per_kv_head : (kv_head + 1) * heads_per_kv_head]
            rows_RD = self._attend_head(heads.flatten(0, 1), keys, values, positions, scale, window)
            out.append(rows_RD.view(num_rows, heads_per_kv_head, -1))
        return torch.cat(out, dim=1)

    def _attend_head(
        self,
        q_RD: torch.Tensor,
        keys_CD: torch.Tensor,
        values_CD: torch.Tensor,
        positions_R: torch.Tensor,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """Every split is visited; a row's result starts with the first one it sees any key of."""
        first_R = (positions_R - window + 1).clamp(min=0)
        folded: Split | None = None
        for start in range(0, len(keys_CD), SPLIT):
            end = min(start + SPLIT, len(keys_CD))
            key_C = torch.arange(start, end)
            is_visible = (key_C >= first_R[:, None]) & (key_C <= positions_R[:, None])
            scores = dot_chain(keys_CD[start:end], q_RD, self.instructions).t() * scale
            part = self._attend_split(scores, values_CD[start:end], is_visible)
            if folded is None:
                folded = part
                continue
            joins = ((first_R < start) & (positions_R >= start))[:, None]
            begins = ((first_R >= start) & (first_R < end))[:, None]
            folded = _choose(begins, part, _choose(joins, merge(folded, part), folded))
        assert folded is not None
        _, total, weighted = folded
        return (weighted / total).bfloat16()

    def _attend_split(self, scores_RC: torch.Tensor, values_CD: torch.Tensor, is_visible_RC: torch.Tensor) -> Split:
        best, total, weights = split_weights(scores_RC, is_visible_RC)
        # + 0 turns -0 into +0: a row must not show how many masked keys followed in its tile.
        weighted = dot_chain(weights.bfloat16(), values_CD.t(), self.instructions) + 0.0
        return best, total, weighted

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, total = _softmax_parts(logits_TV)
        logs = [_log(value) for value in total[:, 0].tolist()]
        return best[:, 0], (best[:, 0].double() + torch.tensor(logs, dtype=torch.float64)).float()

    def softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        best, total = _softmax_parts(logits_TV)
        return exp(logits_TV - _shift(best)) / total

    def argmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        lowest = torch.full_like(logits_TV, -torch.inf)
        return torch.where(logits_TV.isnan(), lowest, logits_TV).argmax(dim=1)

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        total_TK = torch.zeros_like(rows_TJK[:, 0])
        for choice in range(rows_TJK.shape[1]):
            total_TK = total_TK + weights_TJ[:, choice, None] * rows_TJK[:, choice]
        return total_TK


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else (-math.inf if value == 0 else value)


def _normalise(x_TK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    mean = row_sum(x_TK * x_TK) / x_TK.shape[1]
    return x_TK * (1.0 / sqrt(mean + eps)) * weight_K.float()


def _choose(which_R1: torch.Tensor, left: Split, right: Split) -> Split:
    best, total, weighted = (torch.where(which_R1, a, b) for a, b in zip(left, right, strict=True))
    return best, total, weighted


def _shift(best: torch.Tensor) -> torch.Tensor:
    return torch.where(best == -torch.inf, torch.zeros_like(best), best)


def _softmax_parts(logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, sum of exp(logit - maximum)), both (T, 1); NaN in a row makes both NaN."""
    best = logits_TV.amax(dim=1, keepdim=True)
    return best, row_sum(exp(logits_TV - _shift(best)))
