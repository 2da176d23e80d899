"""The operations a model is written in, and the canonical order each must keep.

A model (`cluster/engine/models`) calls these and nothing else for arithmetic, so that the numerics
contract (docs/numerics.md) has one home. Each device has one implementation; every kernel in it has
passed bit-exact admission against the reference (`registry.py`).

Shape legend: T tokens of all sequences of the step, laid end to end; K input features; N output
features; H query heads; G KV heads; D head size; B sequences; V vocabulary; E experts; J experts
chosen for a row; F feed-forward size of an expert. Latent attention: L size of a cached latent row, R of
its rotated part, U of a query head's part without rotation.

Rows never influence each other: row t of every result depends on row t's inputs only, with the same
bits for any T, any neighbours and any column shard of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch


class LinearWeight(Protocol):
    """A weight packed for its device. `pack_linear` makes it; the (N, K) original may then be freed."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        """(T, K) bf16 rows of the original weight, bit for bit, so that a tied embedding needs no second
        copy. Indices must be in range."""
        ...


class ExpertWeight(Protocol):
    """One layer's weight of several experts, (N, K) each, packed for its device by `pack_experts`."""

    @property
    def num_experts(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


class HeadWeight(Protocol):
    """One (N, K) weight per attention head, packed for its device by `pack_heads`."""

    @property
    def num_heads(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...


@dataclass(frozen=True, slots=True)
class GroupedRouting:
    """How `moe_route_grouped` chooses: `top_k` experts of the best `top_groups` of `num_groups` equal groups."""

    top_k: int
    num_groups: int
    top_groups: int
    scoring: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float  # on the weights


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The J experts of each row, ascending by index, and how much each one counts."""

    experts_TJ: torch.Tensor  # int32, always in range and different within a row, also in a row of NaN
    weights_TJ: torch.Tensor  # fp32


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Which rows belong to which sequence, and where their keys lie. Static shapes on a GPU.

    Rows of sequence b are `query_start[b]:query_start[b+1]`; they are its positions
    `context_len[b] - num_rows : context_len[b]`, and row at position p sees keys 0..p.
    `slot_mapping[t]` = block_id * block_size + offset: where row t's own K/V are stored, before any
    row reads them (attention reads what was stored, also for the current chunk).
    """

    query_start: torch.Tensor  # (B+1,) int32
    context_len: torch.Tensor  # (B,) int32, current chunk included
    block_table: torch.Tensor  # (B, max_blocks) int32; entries past the context are ignored
    slot_mapping: torch.Tensor  # (T,) int64; -1: a padding row, not stored
    positions: torch.Tensor  # (T,) int64 absolute positions
    num_rows_max: int  # longest query of the batch
    context_len_max: int
    num_rows_min: int = 1  # no query is shorter, one of padding (0 rows) aside
    num_keys_max: int | None = None  # bound of the sum of context_len, which sizes scratch; None: only the above
    num_prompts_max: int | None = None  # bound of the queries of several rows, which sizes grids; None: all may be

    def num_tiles(self, num_rows: int, rows_per_tile: int, max_rows: int = 1) -> int:
        """Bound of the tiles that cover the queries of more than `max_rows` rows, `num_rows` in all, or the only query.
        With 0 those of one row have tiles, too, and there may be more of them than prompts."""
        num_sequences = self.context_len.shape[0]
        bound = None if max_rows == 0 else self.num_prompts_max
        return num_rows // rows_per_tile + (num_sequences if bound is None else min(num_sequences, bound))


class Rotation(NamedTuple):
    """What `Ops.rope_and_cache` does to rows; see there."""

    cos_sin_PD: torch.Tensor
    num_heads: int
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    norm_eps: float = 0.0


class Ops(Protocol):
    """One device's implementation of every operation."""

    @property
    def name(self) -> str:
        """ "cpu:amx_bf16", "cpu:fma", "cuda:sm90" ...: what the bits depend on."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        ...

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of the residual stream (float32 on CPU)."""
        ...

    def pack_linear(self, weight_NK: torch.Tensor) -> LinearWeight:
        """Take an (N, K) bf16 weight into the device's layout. Any N, any K."""
        ...

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> LinearWeight:
        """Take an (N, K) float8_e4m3fn weight (`kernels/fp8.py`) into the device's layout. Any N, any K.

        `scale` is fp32: (N,), one per row, or (N / R, ceil(K / 128)), one per R rows (a power of two up to 128)
        and 128 columns; matrices laid one below the other share no scale. Raises `ConfigError` on a device
        without FP8 kernels.
        """
        ...

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """y = x Wᵀ (+ bias): one fp32 chain over K ascending per output, bias added in fp32, one
        rounding to `out_dtype` (float32: none).

        With an FP8 weight, x is quantised first unless the operation that made it has done so (`input_of`),
        and the chain is that of docs/numerics.md, "FP8"."""
        ...

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        """(T, F) bf16: silu(gate) * up in fp32 from the two chains, one rounding. `gate_up` was packed
        from the (2F, K) concatenation [gate; up]. silu(x) = x / (1 + exp(-x)). An FP8 layer rounds gate and
        up to bf16 first.

        `input_of`, here and below: the layer that alone will read the result, whole. If it has FP8 weights the
        result comes quantised for it (rows of bytes, `kernels/fp8.py`), with the bits of quantising it later."""
        ...

    def embedding(self, token_ids_T: torch.Tensor, table_VK: torch.Tensor) -> torch.Tensor:
        """(T, K) rows of the bf16 table in `residual_dtype`."""
        ...

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        """(T, K): x / sqrt(mean(x²) + eps) * weight, in fp32 with a fixed order of the sum, one rounding to
        `out_dtype` (float32: none)."""
        ...

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        """residual += update (in place, in `residual_dtype`), then `rms_norm(residual)`."""
        ...

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
        """Split qkv (T, (H+2G)*D) float32, normalise q and k per head if norms are given (Qwen3),
        rotate by position (half-split convention; `cos_sin_PD` holds cos in [:, :D/2], sin in the
        rest, fp32), round to bf16, store K and V at `slot_mapping`, return q (T, H, D) bf16."""
        ...

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """(T, H*D) bf16: causal attention over the paged cache in the canonical split order.

        `window` (at least 1): the row at position p sees keys max(0, p - window + 1) .. p, so `window` of them with
        its own, as `sliding_window_overlay` in transformers' `masking_utils.py` has it (`kv_idx > q_idx -
        sliding_window`). None: keys 0 .. p."""
        ...

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
        """`rope_and_cache`, then `attention` of its q: the same bits, in one kernel where a device has it."""
        ...

    def pack_heads(self, weight_HNK: torch.Tensor) -> HeadWeight:
        """Take the (N, K) bf16 weights of H heads into the device's layout."""
        ...

    def head_linear(self, x_THK: torch.Tensor, weight: HeadWeight) -> torch.Tensor:
        """(T, H, N) bf16: each head's bf16 row through the head's weight, with the bits of
        `linear(x[:, h], weight[h])`."""
        ...

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
        """Of a row (T, L + R) float32: `rms_norm` of the first L, the last R rotated, both rounded to bf16 and
        stored at `slot_mapping`. Of the queries (T, H * (U + R)) float32: (T, H, U) as they are and (T, H, R)
        rotated, bf16. Rotation as in `rope_and_cache`."""
        ...

    def latent_attention(
        self,
        q_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        kv_N11SD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        """(T, H, L) bf16: causal attention of all heads over the one cached row of L + R numbers per token, in
        the canonical split order of `attention`. A key is the row, its score one chain over L and then R; a
        value is the row's first L."""
        ...

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits -> (max (T,), logsumexp (T,)) fp32, fixed order per row. NaN propagates, so
        `isnan(logsumexp)` detects a broken row."""
        ...

    def softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """(T, V) fp32 probabilities of fp32 logits, fixed order per row; -inf gives exactly 0."""
        ...

    def argmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """(T,) int64 position of each row's maximum; ties go to the lower id, NaN counts as -inf."""
        ...

    def pack_experts(self, weight_ENK: torch.Tensor) -> ExpertWeight:
        """Take the (N, K) bf16 weights of E experts into the device's layout."""
        ...

    def moe_route(self, logits_TE: torch.Tensor, top_k: int, *, renormalise: bool) -> ExpertChoice:
        """fp32 logits -> the `top_k` experts with the largest softmax; ties go to the lower index.

        `renormalise` divides the chosen probabilities by their sum, which is taken exactly, in steps of
        2^-40, so that it has no order. A row with NaN gets NaN weights.
        """
        ...

    def moe_route_grouped(
        self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, routing: GroupedRouting
    ) -> ExpertChoice:
        """fp32 logits -> experts as DeepSeek chooses them. Scores are `softmax`, or 1 / (1 + exp(-logit)).

        What ranks experts is score + bias (fp32), what ranks groups is their largest of these (softmax) or the
        sum of their two largest (sigmoid); ties go to the lower index. Weights are the scores of the chosen,
        divided by their exact sum as in `moe_route` (but at least 2^-40) if `renormalise`, then times `scale`.
        A row with NaN among its scores chooses the first experts, with NaN weights.
        """
        ...

    def moe_experts(
        self,
        x_TK: torch.Tensor,
        experts_TJ: torch.Tensor,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        *,
        first_expert: int = 0,
    ) -> torch.Tensor:
        """(T, J, K) in `residual_dtype`: row t through each of its experts, with the bits of
        `linear(linear_silu_mul(x[t], gate_up[e]), down[e], out_dtype=residual_dtype)`.

        The weights hold experts `first_expert : first_expert + E`; (t, j) of other experts are left as
        they are in fresh memory, for the rank that holds them to fill.
        """
        ...

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        """(T, K) in `residual_dtype`: Σ weight * row from zero over j ascending (so by expert index), in
        fp32, one rounding."""
        ...


class TwoStepAttention:
    """`Ops.rope_attention` of what has no kernel for both."""

    __slots__ = ()

    def rope_attention(
        self: Ops,
        qkv_TC: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        rotation: Rotation,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        q_THD = self.rope_and_cache(qkv_TC, kv_N2GSD, metadata, *rotation)
        return self.attention(q_THD, kv_N2GSD, metadata, scale, window=window)
