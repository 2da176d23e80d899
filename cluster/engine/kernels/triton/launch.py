"""Starts the Triton kernels: checks shapes, picks grids, owns no state.

Every function allocates its result with the current allocator and never waits for the device, so a
call can be captured into a CUDA graph. Inputs whose first element is not 16-byte aligned are copied:
alignment decides how a compiler deals elements to threads, and so, in a sum, the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention, linear, norm, rope, vocab
from cluster.engine.kernels.triton.overlap import overlap
from cluster.engine.kernels.triton.plans import SPLIT_KEYS, VOCABULARY_CHUNK, AttentionPlan, LinearPlan, block_kv
from cluster.engine.kernels.triton.table import unmeasured_plan


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if dense and 16-byte aligned, else a copy that is."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.contiguous().clone()


def _tma_takes(x: torch.Tensor) -> bool:
    """The bulk copy engine wants rows that start at multiples of 16 bytes."""
    return x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _hopper_takes(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool,
) -> bool:
    """Whether a kernel of `launch_hopper` computes this product; else any chain does."""
    through_engine = (x_MK, w_NK, out_MN) if plan.kind == "hopper" else (x_MK, w_NK)
    return (
        all(_tma_takes(x) for x in through_engine)
        and x_MK.element_size() == 2
        and (plan.kind == "stream" or bias_N is None or not silu_mul)
    )


def run_linear(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    plan: LinearPlan,
    *,
    silu_mul: bool = False,
    num_programs: int = 1,
    pdl: int = False,
) -> None:
    """out = x Wᵀ (+ bias), or silu(gate) * up with W = [gate; up] of 2N rows. Rows of all operands are dense."""
    if plan.kind in ("stream", "hopper"):
        if _hopper_takes(x_MK, w_NK, bias_N, out_MN, plan, silu_mul=silu_mul):
            from cluster.engine.kernels.triton import launch_hopper

            run = launch_hopper.run_stream if plan.kind == "stream" else launch_hopper.run_hopper
            run(x_MK, w_NK, bias_N, out_MN, plan, silu_mul=silu_mul, num_programs=num_programs, pdl=pdl)
            return
        plan = unmeasured_plan(x_MK.shape[0])
    num_rows, in_features = x_MK.shape
    out_features = out_MN.shape[1]
    tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(out_features, plan.block_n)
    bias = bias_N if bias_N is not None else out_MN
    if plan.kind == "tma" and _tma_takes(x_MK) and _tma_takes(w_NK) and _tma_takes(out_MN):
        parts = plan.store_parts * (out_MN.element_size() // x_MK.element_size())
        x_desc = TensorDescriptor.from_tensor(x_MK, [plan.block_m, plan.block_k])
        w_desc = TensorDescriptor.from_tensor(w_NK, [plan.block_n, plan.block_k])
        out_desc = TensorDescriptor.from_tensor(out_MN, [plan.block_m, plan.block_n // parts])
        programs = min(tiles, num_programs) if plan.persistent else tiles
        linear.tma_kernel[(programs,)](
            x_desc, w_desc, out_desc, bias, num_rows, out_features, in_features,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
            GROUP_M=plan.group_m, SWAP=plan.swap, STORE_PARTS=parts, FLATTEN=plan.flatten,
            WARP_SPECIALIZE=plan.warp_specialize, HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul,
            OUT_DTYPE=getattr(triton.language, str(out_MN.dtype).removeprefix("torch.")),
            num_warps=plan.num_warps, num_stages=plan.num_stages, **overlap(pdl),
        )  # fmt: skip
        return
    linear.chain_kernel[(tiles,)](
        x_MK, w_NK, bias, out_MN, num_rows, out_features, in_features,
        x_MK.stride(0), w_NK.stride(0), out_MN.stride(0),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m,
        SWAP=plan.swap, EVEN_K=in_features % plan.block_k == 0, EVICT_FIRST=plan.evict_first,
        HAS_BIAS=bias_N is not None, SILU_MUL=silu_mul, num_warps=plan.num_warps, num_stages=plan.num_stages,
        **overlap(pdl),
    )  # fmt: skip


def run_rms_norm(
    x_TK: torch.Tensor,
    update_TK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    pdl: int = False,
) -> torch.Tensor:
    """rms_norm(x), or x += update in place, then rms_norm(x). In place needs x dense and aligned."""
    num_rows, width = x_TK.shape
    if update_TK is None:
        x_TK = aligned(x_TK)
    elif not x_TK.is_contiguous() or x_TK.data_ptr() % 16:
        raise ValueError("the residual must be dense and 16-byte aligned: it is updated in place")
    else:
        update_TK = aligned(update_TK)
    out = torch.empty((num_rows, width), dtype=out_dtype, device=x_TK.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        norm.rms_norm_kernel[(num_rows,)](
            x_TK, x_TK if update_TK is None else update_TK, aligned(weight_K), out, eps,
            K=width, BLOCK_K=block, HAS_UPDATE=update_TK is not None,
            num_warps=max(1, min(16, block // 512)), **overlap(pdl),
        )  # fmt: skip
    return out


def run_rope_and_cache(
    qkv_TC: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    cos_sin_PD: torch.Tensor,
    num_heads: int,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    norm_eps: float,
    *,
    pdl: int = False,
) -> torch.Tensor:
    num_rows = qkv_TC.shape[0]
    _, _, num_kv_heads, block_size, head_size = kv_N2GSD.shape
    if qkv_TC.shape[1] != (num_heads + 2 * num_kv_heads) * head_size:
        raise ValueError(
            f"qkv has {qkv_TC.shape[1]} columns, expected ({num_heads} + 2 * {num_kv_heads}) * {head_size}"
        )
    if (q_norm_D is None) != (k_norm_D is None):
        raise ValueError("q_norm and k_norm are given together or not at all")
    q_out = torch.empty((num_rows, num_heads, head_size), dtype=kv_N2GSD.dtype, device=qkv_TC.device)
    num_pairs = num_rows * (num_heads + 2 * num_kv_heads)
    qkv_TC = aligned(qkv_TC)
    if num_pairs:
        rope.rope_cache_kernel[(triton.cdiv(num_pairs, 16),)](
            qkv_TC, q_out, kv_N2GSD, cos_sin_PD, metadata.positions, metadata.slot_mapping,
            cos_sin_PD if q_norm_D is None else q_norm_D, cos_sin_PD if k_norm_D is None else k_norm_D,
            num_pairs, qkv_TC.stride(0), kv_N2GSD.stride(0), kv_N2GSD.stride(1), kv_N2GSD.stride(2), norm_eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, D=head_size,
            BLOCK_HALF=triton.next_power_of_2(head_size // 2), BLOCK_SIZE=block_size, PAIRS=16,
            HAS_NORM=q_norm_D is not None, num_warps=4, **overlap(pdl),
        )  # fmt: skip
    return q_out


_FEW_SEQUENCES = 8  # that take the split kernels with several rows each: partial results of rows take memory


def run_attention(
    q_THD: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    plan: AttentionPlan,
    num_multiprocessors: int,
    out_dtype: torch.dtype | None = None,
    *,
    window: int | None = None,
    pdl: int = False,
    lists: WorkLists | None = None,
) -> torch.Tensor:
    """(T, H * D) in q's type or the one given. `lists` keeps what all layers of a step share.

    Sequences of few rows take the split kernels, the others the tiled one: the same bits.
    """
    num_rows, num_heads, head_size = q_THD.shape
    num_kv_heads = kv_N2GSD.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    if scale <= 0:
        raise ValueError(f"the softmax scale must be positive, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least the row's own key, got {window}")
    out = torch.empty((num_rows, num_heads * head_size), dtype=out_dtype or q_THD.dtype, device=q_THD.device)
    if num_rows == 0:
        return out
    call = _AttentionCall(q_THD, kv_N2GSD, metadata, out, scale / math.log(2.0), window, pdl, lists or WorkLists())
    split_rows_max = max(1, plan.split_block_rows // call.group) if call.num_sequences <= _FEW_SEQUENCES else 1
    if metadata.num_rows_max <= split_rows_max:
        _run_split(call, plan, metadata.num_rows_max, num_multiprocessors)
    elif call.num_sequences == 1:
        _run_prefill(call, plan, 0)
    else:
        if metadata.num_rows_min <= 1:
            _run_split(call, plan, 1, num_multiprocessors)
        _run_prefill(call, plan, 1)
    return out


class WorkLists:
    """What the attention kernels of all layers of a step have to do, listed once, on the device.

    Of the step that was asked for last: its metadata is one object, made anew for every step.
    """

    def __init__(self) -> None:
        self._metadata: AttentionMetadata | None = None
        self._tiles: dict[tuple[int, int, int], torch.Tensor] = {}
        self._splits: dict[tuple[int, int, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def tiles(self, metadata: AttentionMetadata, num_tiles: int, rows_per_tile: int, max_rows: int) -> torch.Tensor:
        """(num_tiles, 8) int32: the records of `attention.list_tiles_kernel`."""
        self._turn_to(metadata)
        key = (num_tiles, rows_per_tile, max_rows)
        found = self._tiles.get(key)
        if found is None:
            num_sequences = metadata.context_len.shape[0]
            found = torch.empty((num_tiles, 8), dtype=torch.int32, device=metadata.context_len.device)
            attention.list_tiles_kernel[(num_tiles,)](
                found, metadata.query_start, metadata.context_len, num_sequences, max_rows,
                ROWS_PER_TILE=rows_per_tile, BLOCK_B=_block_b(num_sequences), num_warps=1,
            )  # fmt: skip
            self._tiles[key] = found
        return found

    def splits(
        self, metadata: AttentionMetadata, num_records: int, max_rows: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(num_records, 8) and (B + 1,) int32: the records and firsts of `attention.list_splits_kernel`."""
        self._turn_to(metadata)
        key = (num_records, max_rows, window)
        found = self._splits.get(key)
        if found is None:
            num_sequences, device = metadata.context_len.shape[0], metadata.context_len.device
            records = torch.empty((num_records, 8), dtype=torch.int32, device=device)
            firsts = torch.empty(num_sequences + 1, dtype=torch.int32, device=device)
            attention.list_splits_kernel[(num_records,)](
                records, firsts, metadata.query_start, metadata.context_len, num_sequences, max_rows, window,
                SPLIT_KEYS=SPLIT_KEYS, BLOCK_B=_block_b(num_sequences), num_warps=1,
            )  # fmt: skip
            found = self._splits[key] = (records, firsts)
        return found

    def _turn_to(self, metadata: AttentionMetadata) -> None:
        if self._metadata is not metadata:
            self._metadata = metadata
            self._tiles.clear()
            self._splits.clear()


def _block_b(num_sequences: int) -> int:
    """Few sizes: each is compiled."""
    return max(16, int(triton.next_power_of_2(num_sequences)))


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    q_THD: torch.Tensor
    kv_N2GSD: torch.Tensor
    metadata: AttentionMetadata
    out: torch.Tensor
    scale_log2: float
    window: int | None  # None is a constant to the compiler
    pdl: int
    lists: WorkLists

    @property
    def group(self) -> int:
        return self.q_THD.shape[1] // self.kv_N2GSD.shape[2]

    @property
    def num_sequences(self) -> int:
        return self.metadata.context_len.shape[0]

    def constants(self, block_rows: int) -> dict[str, int]:
        head_size = self.q_THD.shape[2]
        return {
            "NUM_KV_HEADS": self.kv_N2GSD.shape[2],
            "GROUP": self.group,
            "D": head_size,
            "BLOCK_D": triton.next_power_of_2(head_size),
            "BLOCK_ROWS": block_rows,
            "BLOCK_KV": block_kv(head_size),
            "SPLIT_KEYS": SPLIT_KEYS,
            "BLOCK_SIZE": self.kv_N2GSD.shape[3],
        }


def _run_split(call: _AttentionCall, plan: AttentionPlan, max_rows: int, num_multiprocessors: int) -> None:
    """Serve the sequences with at most `max_rows` rows: partial results of all splits, then the fold."""
    metadata, kv = call.metadata, call.kv_N2GSD
    num_heads, head_size = call.q_THD.shape[1:]
    block_rows = max(16, triton.next_power_of_2(max_rows * call.group))
    splits_each = triton.cdiv(metadata.context_len_max, SPLIT_KEYS)
    if call.window is not None:  # that many keys in a row, wherever they begin
        splits_each = min(splits_each, (call.window + max_rows - 3) // SPLIT_KEYS + 2)
    records = call.num_sequences * splits_each
    if splits_each > 1 and metadata.num_keys_max is not None:
        records = min(records, call.num_sequences + metadata.num_keys_max // SPLIT_KEYS)
    items = records * kv.shape[2]
    scratch_items = items if splits_each > 1 else 1  # a single split needs no partial results
    partial = torch.empty((scratch_items, max_rows * call.group, head_size), dtype=torch.float32, device=kv.device)
    partial_m = torch.empty((scratch_items, max_rows * call.group), dtype=torch.float32, device=kv.device)
    partial_l = torch.empty((scratch_items, max_rows * call.group, 8), dtype=torch.float32, device=kv.device)
    splits, firsts = call.lists.splits(metadata, records, max_rows, call.window)
    programs = min(items, num_multiprocessors * plan.split_programs_per_multiprocessor)
    constants = call.constants(block_rows)
    attention.split_kernel[(programs,)](
        call.q_THD, kv, call.out, partial, partial_m, partial_l, splits, firsts, metadata.block_table,
        call.num_sequences, max_rows, call.window, call.scale_log2, call.q_THD.stride(0),
        call.out.stride(0), metadata.block_table.stride(0), kv.stride(0), kv.stride(1), kv.stride(2), **constants,
        num_warps=plan.split_num_warps, num_stages=plan.split_num_stages, **overlap(call.pdl),
    )  # fmt: skip
    if splits_each <= 1:
        return
    for unused in ("BLOCK_ROWS", "BLOCK_KV", "BLOCK_SIZE"):
        del constants[unused]
    attention.fold_kernel[(call.num_sequences, max_rows * num_heads)](
        call.out, partial, partial_m, partial_l, firsts, metadata.query_start, metadata.context_len,
        max_rows, call.window, call.out.stride(0), **constants, num_warps=1, **overlap(call.pdl),
    )  # fmt: skip


def _run_prefill(call: _AttentionCall, plan: AttentionPlan, max_rows: int) -> None:
    """Serve the sequences with more than `max_rows` rows."""
    metadata, kv = call.metadata, call.kv_N2GSD
    num_rows, _, head_size = call.q_THD.shape
    in_whole_blocks = head_size in (64, 128) and kv.shape[3] % block_kv(head_size) == 0
    if plan.prefill_kind == "hopper" and in_whole_blocks:
        _run_prefill_hopper(call, plan, max_rows)
        return
    block_rows = max(plan.prefill_block_rows, triton.next_power_of_2(call.group))
    tiles = num_rows // (block_rows // call.group) + call.num_sequences
    keys = block_kv(head_size)
    use_tma = plan.prefill_use_tma and kv.shape[3] % keys == 0 and head_size in (64, 128, 256)
    kv_rows = kv
    if use_tma:
        rows = (kv.shape[0] - 1) * (kv.stride(0) // head_size) + 2 * kv.stride(1) // head_size
        kv_rows = TensorDescriptor(kv, [rows, head_size], [head_size, 1], [keys, head_size])
    attention.prefill_kernel[(tiles, kv.shape[2])](
        call.q_THD, kv, kv_rows, call.out, metadata.query_start, metadata.context_len, metadata.block_table,
        call.num_sequences, max_rows, call.window, call.scale_log2, call.q_THD.stride(0), call.out.stride(0),
        metadata.block_table.stride(0), kv.stride(0), kv.stride(1), kv.stride(2),
        **call.constants(block_rows), BLOCK_B=_block_b(call.num_sequences), USE_TMA=use_tma,
        num_warps=plan.prefill_num_warps, num_stages=plan.prefill_num_stages,
    )  # fmt: skip


def _run_prefill_hopper(call: _AttentionCall, plan: AttentionPlan, max_rows: int) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    from cluster.engine.kernels.triton import attention_hopper

    metadata, kv = call.metadata, call.kv_N2GSD
    num_rows, _, head_size = call.q_THD.shape
    keys = block_kv(head_size)
    rows = (kv.shape[0] - 1) * (kv.stride(0) // head_size) + 2 * kv.stride(1) // head_size
    layout = NVMMASharedLayout(128, 16, 2)
    kv_rows = GluonTensorDescriptor(kv, [rows, head_size], [head_size, 1], [keys, head_size], layout)
    rows_per_tile = 128 // call.group
    num_tiles = num_rows // rows_per_tile + call.num_sequences
    constants = call.constants(128)
    for unused in ("NUM_KV_HEADS", "BLOCK_D", "BLOCK_ROWS"):
        del constants[unused]
    attention_hopper.prefill_hopper_kernel[(num_tiles, kv.shape[2])](
        call.q_THD, kv_rows, call.out, call.lists.tiles(metadata, num_tiles, rows_per_tile, max_rows),
        metadata.block_table, call.window, call.scale_log2, call.q_THD.stride(0), call.out.stride(0),
        metadata.block_table.stride(0), kv.stride(0) // head_size, kv.stride(1) // head_size,
        kv.stride(2) // head_size, **constants, STAGES=plan.prefill_num_stages, num_warps=4,
    )  # fmt: skip


def run_vocab_stats(logits_TV: torch.Tensor, *, pdl: int = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(max, logsumexp) fp32 and (argmax) int64 of each row; ties go to the lower id."""
    num_rows, vocabulary = logits_TV.shape
    logits_TV = aligned(logits_TV)
    device = logits_TV.device
    chunks = triton.cdiv(vocabulary, VOCABULARY_CHUNK)
    maximum = torch.empty(num_rows, dtype=torch.float32, device=device)
    logsumexp = torch.empty_like(maximum)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows:
        chunk_max = torch.empty((num_rows, chunks), dtype=torch.float32, device=device)
        chunk_sum = torch.empty_like(chunk_max)
        chunk_id = torch.empty((num_rows, chunks), dtype=torch.int32, device=device)
        vocab.chunk_stats_kernel[(chunks, num_rows)](
            logits_TV, chunk_max, chunk_sum, chunk_id, logits_TV.stride(0), vocabulary, chunks,
            CHUNK=VOCABULARY_CHUNK, num_warps=4, **overlap(pdl),
        )  # fmt: skip
        vocab.fold_stats_kernel[(num_rows,)](
            chunk_max, chunk_sum, chunk_id, maximum, logsumexp, argmax, chunks, vocabulary,
            BLOCK_CHUNKS=triton.next_power_of_2(chunks), num_warps=1, **overlap(pdl),
        )  # fmt: skip
    return maximum, logsumexp, argmax
