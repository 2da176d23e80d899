"""Starts the attention kernels: which sequences take which kernel, and the lists of work they share.

As in `launch.py`, nothing waits for the device, and a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from cluster.engine.kernels.ops import AttentionMetadata, Rotation
from cluster.engine.kernels.triton import attention, launch
from cluster.engine.kernels.triton.overlap import overlap
from cluster.engine.kernels.triton.plans import SPLIT_KEYS, AttentionPlan, LatentPlan, block_kv

_FEW_SEQUENCES = 8  # that take the split kernels with several rows each: partial results of rows take memory
# Of partial results at a time. Sequences have at most the splits of the pool's keys, a few tens of MiB, unless many
# share a long prefix; then they are served some at a time.
MOST_SCRATCH_BYTES = 256 << 20
# Sequences, of which a part begins at a multiple: int32 tensors are aligned there as in their beginning, or kernels
# would be compiled anew.
_ALIGNED = 4


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
    call = _checked(q_THD, kv_N2GSD, metadata, scale, out_dtype or q_THD.dtype, window, pdl, lists)
    if q_THD.shape[0] == 0:
        return call.out
    split_rows, tiled_above = paths(plan, metadata, call.group)
    if split_rows:
        for part in _within_scratch(call, split_rows):
            _run_split(part, plan, split_rows, num_multiprocessors)
    if tiled_above is not None:
        _run_prefill(call, plan, tiled_above, num_multiprocessors)
    return call.out


def takes_rope(plan: AttentionPlan, metadata: AttentionMetadata, rotation: Rotation) -> bool:
    """Whether the split kernel should rotate and store, too, in this step. Each of its programs rotates q, and where
    contexts have several splits there are as many more."""
    has_few = metadata.context_len.shape[0] <= plan.split_rope_up_to and metadata.context_len_max <= SPLIT_KEYS
    return has_few and can_take_rope(plan, metadata, rotation)


def can_take_rope(plan: AttentionPlan, metadata: AttentionMetadata, rotation: Rotation) -> bool:
    """Single rows, and no norm of heads, whose sum the rotary kernel has in an order of its own."""
    is_plain = rotation.q_norm_D is None and rotation.k_norm_D is None
    has_split = plan.split_rope_up_to > 0 and plan.few_rows_kind == "split"
    return has_split and metadata.num_rows_max == 1 and is_plain


def run_rope_attention(
    qkv_TC: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    rotation: Rotation,
    scale: float,
    plan: AttentionPlan,
    num_multiprocessors: int,
    *,
    window: int | None = None,
    pdl: int = False,
    lists: WorkLists | None = None,
) -> torch.Tensor:
    """`run_rope_and_cache` and `run_attention` of its q: in one kernel if the plan has that at all (`takes_rope` tells
    where it pays), else one after the other."""
    if not can_take_rope(plan, metadata, rotation):
        q_THD = launch.run_rope_and_cache(qkv_TC, kv_N2GSD, metadata, *rotation, pdl=pdl)
        return run_attention(
            q_THD, kv_N2GSD, metadata, scale, plan, num_multiprocessors, window=window, pdl=pdl, lists=lists
        )
    num_heads, num_kv_heads, head_size = rotation.num_heads, kv_N2GSD.shape[2], kv_N2GSD.shape[4]
    launch.check_qkv(qkv_TC, num_heads, num_kv_heads, head_size)
    q_THD = qkv_TC.view(len(qkv_TC), num_heads + 2 * num_kv_heads, head_size)[:, :num_heads]
    call = _checked(q_THD, kv_N2GSD, metadata, scale, kv_N2GSD.dtype, window, pdl, lists)
    if len(qkv_TC):
        for part in _within_scratch(replace(call, cos_sin_PD=rotation.cos_sin_PD), 1):
            _run_split(part, plan, 1, num_multiprocessors)
    return call.out


def _checked(
    q_THD: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
    out_dtype: torch.dtype,
    window: int | None,
    pdl: int,
    lists: WorkLists | None,
) -> _AttentionCall:
    num_rows, num_heads, head_size = q_THD.shape
    num_kv_heads = kv_N2GSD.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    if scale <= 0:
        raise ValueError(f"the softmax scale must be positive, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least the row's own key, got {window}")
    out = torch.empty((num_rows, num_heads * head_size), dtype=out_dtype, device=q_THD.device)
    return _AttentionCall(q_THD, kv_N2GSD, metadata, out, scale / math.log(2.0), window, pdl, lists or WorkLists())


def paths(plan: AttentionPlan | LatentPlan, metadata: AttentionMetadata, group: int) -> tuple[int, int | None]:
    """Rows of a sequence up to which the split kernels serve it (0: none), and above which the tiled one does (None:
    there are no such sequences). `group`: query heads of a KV head, or heads of a tile in latent attention."""
    if plan.few_rows_kind == "tiled":
        return 0, 0
    num_sequences = metadata.context_len.shape[0]
    split_rows_max = max(1, plan.split_block_rows // group) if num_sequences <= _FEW_SEQUENCES else 1
    if metadata.num_rows_max <= split_rows_max:
        return metadata.num_rows_max, None
    if num_sequences == 1:
        return 0, 0
    return (1 if metadata.num_rows_min <= 1 else 0), 1


class WorkLists:
    """What the attention kernels of all layers of a step have to do, listed once, on the device.

    Of the step that was asked for last: its metadata is one object, made anew for every step.
    """

    def __init__(self) -> None:
        self._newest: _StepLists | None = None

    def tiles(self, metadata: AttentionMetadata, num_tiles: int, rows_per_tile: int, max_rows: int) -> torch.Tensor:
        """(num_tiles, 8) int32: the records of `attention.list_tiles_kernel`."""
        lists = self._of(metadata)
        key = (num_tiles, rows_per_tile, max_rows)
        found = lists.tiles.get(key)
        if found is None:
            num_sequences = metadata.context_len.shape[0]
            found = torch.empty((num_tiles, 8), dtype=torch.int32, device=metadata.context_len.device)
            attention.list_tiles_kernel[(num_tiles,)](
                found, metadata.query_start, metadata.context_len, num_sequences, max_rows,
                ROWS_PER_TILE=rows_per_tile, BLOCK_B=_block_b(num_sequences), num_warps=1,
            )  # fmt: skip
            lists.tiles[key] = found
        return found

    def splits(
        self, metadata: AttentionMetadata, num_records: int, max_rows: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(num_records, 8) and (B + 1,) int32: the records and firsts of `attention.list_splits_kernel`."""
        lists = self._of(metadata)
        key = (num_records, max_rows, window)
        found = lists.splits.get(key)
        if found is None:
            num_sequences, device = metadata.context_len.shape[0], metadata.context_len.device
            records = torch.empty((num_records, 8), dtype=torch.int32, device=device)
            firsts = torch.empty(num_sequences + 1, dtype=torch.int32, device=device)
            attention.list_splits_kernel[(num_records,)](
                records, firsts, metadata.query_start, metadata.context_len, num_sequences, max_rows, window,
                SPLIT_KEYS=SPLIT_KEYS, BLOCK_B=_block_b(num_sequences), num_warps=1,
            )  # fmt: skip
            found = lists.splits[key] = (records, firsts)
        return found

    def _of(self, metadata: AttentionMetadata) -> _StepLists:
        """Those of this step and no other, whichever threads ask."""
        lists = self._newest
        if lists is None or lists.metadata is not metadata:
            lists = self._newest = _StepLists(metadata, {}, {})
        return lists


@dataclass(frozen=True, slots=True)
class _StepLists:
    metadata: AttentionMetadata
    tiles: dict[tuple[int, int, int], torch.Tensor]
    splits: dict[tuple[int, int, int | None], tuple[torch.Tensor, torch.Tensor]]


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
    cos_sin_PD: torch.Tensor | None = None  # of rows that are yet to be rotated: q is the first part of qkv then

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


def bound_of_splits(metadata: AttentionMetadata, max_rows: int, window: int | None) -> tuple[int, int]:
    """The most splits that a sequence has, and all of them."""
    num_sequences = metadata.context_len.shape[0]
    splits_each = triton.cdiv(metadata.context_len_max, SPLIT_KEYS)
    if window is not None:  # that many keys in a row, wherever they begin
        splits_each = min(splits_each, (window + max_rows - 3) // SPLIT_KEYS + 2)
    splits = num_sequences * splits_each
    if splits_each > 1 and metadata.num_keys_max is not None:
        splits = min(splits, num_sequences + metadata.num_keys_max // SPLIT_KEYS)
    return splits_each, splits


def in_parts(
    metadata: AttentionMetadata, max_rows: int, window: int | None, num_heads: int, width: int
) -> Iterator[AttentionMetadata]:
    """All sequences, or as many at a time as have scratch for the partial results of their splits: of each row and head
    `width` values, a maximum, and a sum in 8 lanes."""
    splits_each, splits = bound_of_splits(metadata, max_rows, window)
    bytes_each = max_rows * num_heads * (width + 9) * 4
    if splits_each <= 1 or splits * bytes_each <= MOST_SCRATCH_BYTES:
        yield metadata
        return
    count = max(_ALIGNED, MOST_SCRATCH_BYTES // (bytes_each * splits_each) // _ALIGNED * _ALIGNED)
    for first in range(0, metadata.context_len.shape[0], count):
        yield replace(
            metadata,
            query_start=metadata.query_start[first : first + count + 1],
            context_len=metadata.context_len[first : first + count],
            block_table=metadata.block_table[first : first + count],
            num_keys_max=None,
        )


def _within_scratch(call: _AttentionCall, max_rows: int) -> Iterator[_AttentionCall]:
    for part in in_parts(call.metadata, max_rows, call.window, *call.q_THD.shape[1:]):
        yield call if part is call.metadata else replace(call, metadata=part)


def _run_split(call: _AttentionCall, plan: AttentionPlan, max_rows: int, num_multiprocessors: int) -> None:
    """Serve the sequences with at most `max_rows` rows: partial results of all splits, then the fold."""
    metadata, kv = call.metadata, call.kv_N2GSD
    num_heads, head_size = call.q_THD.shape[1:]
    block_rows = max(16, triton.next_power_of_2(max_rows * call.group))
    splits_each, records = bound_of_splits(metadata, max_rows, call.window)
    items = records * kv.shape[2]
    scratch_items = items if splits_each > 1 else 1  # a single split needs no partial results
    partial = torch.empty((scratch_items, max_rows * call.group, head_size), dtype=torch.float32, device=kv.device)
    partial_m = torch.empty((scratch_items, max_rows * call.group), dtype=torch.float32, device=kv.device)
    partial_l = torch.empty((scratch_items, max_rows * call.group, 8), dtype=torch.float32, device=kv.device)
    splits, firsts = call.lists.splits(metadata, records, max_rows, call.window)
    programs = min(items, num_multiprocessors * plan.split_programs_per_multiprocessor)
    constants = call.constants(block_rows)
    cos_sin = call.q_THD if call.cos_sin_PD is None else call.cos_sin_PD
    attention.split_kernel[(programs,)](
        call.q_THD, kv, call.out, partial, partial_m, partial_l, splits, firsts, metadata.block_table,
        cos_sin, metadata.slot_mapping, call.num_sequences, max_rows, call.window, call.scale_log2,
        call.q_THD.stride(0), call.out.stride(0), metadata.block_table.stride(0), kv.stride(0), kv.stride(1),
        kv.stride(2), **constants, TAKES_ROPE=call.cos_sin_PD is not None,
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


def _run_prefill(call: _AttentionCall, plan: AttentionPlan, max_rows: int, num_multiprocessors: int) -> None:
    """Serve the sequences with more than `max_rows` rows."""
    metadata, kv = call.metadata, call.kv_N2GSD
    num_rows, _, head_size = call.q_THD.shape
    in_whole_blocks = head_size in (64, 128) and kv.shape[3] % block_kv(head_size) == 0
    if plan.prefill_kind == "hopper" and in_whole_blocks:
        _run_prefill_hopper(call, plan, max_rows, num_multiprocessors)
        return
    block_rows = max(plan.prefill_block_rows, triton.next_power_of_2(call.group))
    tiles = metadata.num_tiles(num_rows, block_rows // call.group, max_rows)
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


def _run_prefill_hopper(call: _AttentionCall, plan: AttentionPlan, max_rows: int, num_multiprocessors: int) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor

    from cluster.engine.kernels.triton import attention_hopper
    from cluster.engine.kernels.triton.gluon_names import shared_layout

    metadata, kv = call.metadata, call.kv_N2GSD
    num_rows, _, head_size = call.q_THD.shape
    keys = block_kv(head_size)
    rows = (kv.shape[0] - 1) * (kv.stride(0) // head_size) + 2 * kv.stride(1) // head_size
    layout = shared_layout(128, 16)
    kv_rows = GluonTensorDescriptor(kv, [rows, head_size], [head_size, 1], [keys, head_size], layout)
    rows_per_tile = 128 // call.group
    num_tiles = metadata.num_tiles(num_rows, rows_per_tile, max_rows)
    constants = call.constants(128)
    for unused in ("BLOCK_D", "BLOCK_ROWS"):
        del constants[unused]
    programs = min(num_multiprocessors, num_tiles * kv.shape[2])
    attention_hopper.prefill_hopper_kernel[(programs,)](
        call.q_THD, kv_rows, call.out, call.lists.tiles(metadata, num_tiles, rows_per_tile, max_rows),
        metadata.block_table, call.window, call.scale_log2, call.q_THD.stride(0), call.out.stride(0),
        metadata.block_table.stride(0), kv.stride(0) // head_size, kv.stride(1) // head_size,
        kv.stride(2) // head_size, **constants, STAGES=plan.prefill_num_stages, num_warps=4,
    )  # fmt: skip
