"""Both ends of a step: laying it out on the device, and telling the host what it drew.

The host's side of either is pinned memory, which the kernels read and write in place: a copy beside a small kernel
costs the device five times what the kernel does (`docs/log.md`). For the packed order see
`cluster/engine/gpu/staging.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["T", "B", "R", "M", "stride_table"])
def unpack_kernel(
    packed_ptr, drawn_ptr, token_ptr, position_ptr, slot_ptr, logits_ptr, query_start_ptr, context_ptr, table_ptr,
    T, B, R, M, stride_table, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    contexts = packed_ptr + B + 1
    logits = contexts + B
    tokens = logits + R
    tl.store(query_start_ptr + offs, tl.load(packed_ptr + offs, mask=offs <= B), mask=offs <= B)
    tl.store(context_ptr + offs, tl.load(contexts + offs, mask=offs < B), mask=offs < B)
    tl.store(logits_ptr + offs, tl.load(logits + offs, mask=offs < R).to(tl.int64), mask=offs < R)
    in_rows = offs < T
    source = tl.load(tokens + T + offs, mask=in_rows, other=-1)
    known = tl.load(tokens + offs, mask=in_rows, other=0).to(tl.int64)
    drawn = tl.load(drawn_ptr + tl.maximum(source, 0), mask=in_rows & (source >= 0), other=0)
    tl.store(token_ptr + offs, tl.where(source >= 0, drawn, known), mask=in_rows)
    tl.store(position_ptr + offs, tl.load(tokens + 2 * T + offs, mask=in_rows).to(tl.int64), mask=in_rows)
    tl.store(slot_ptr + offs, tl.load(tokens + 3 * T + offs, mask=in_rows).to(tl.int64), mask=in_rows)
    in_table = offs < B * M
    blocks = tl.load(tokens + 4 * T + offs, mask=in_table)
    tl.store(table_ptr + (offs // M).to(tl.int64) * stride_table + offs % M, blocks, mask=in_table)


def unpack_step(
    packed: torch.Tensor,
    drawn_R: torch.Tensor,
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    logits_R: torch.Tensor,
    query_start: torch.Tensor,
    context_len_B: torch.Tensor,
    block_table_BM: torch.Tensor,
    *,
    num_rows: int,
    num_sequences: int,
    num_logits: int,
    num_columns: int,
) -> None:
    """Fill leading parts of the static tensors; a token with a source is taken from `drawn_R` (int64). `packed` may be
    pinned host memory; it must stay as it is until the kernel is done."""
    size = max(num_rows, num_sequences + 1, num_logits, num_sequences * num_columns)
    unpack_kernel[(triton.cdiv(size, _BLOCK),)](
        packed, drawn_R, token_ids_T, positions_T, slot_mapping_T, logits_R, query_start, context_len_B, block_table_BM,
        num_rows, num_sequences, num_logits, num_columns, block_table_BM.stride(0), BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "capacity"])
def tell_kernel(chosen_ptr, sound_ptr, sound_too_ptr, tokens_ptr, host_ptr, R, capacity, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < R
    chosen = tl.load(chosen_ptr + offs, mask=keep, other=0)
    tl.store(tokens_ptr + offs, chosen, mask=keep)
    tl.store(host_ptr + offs, chosen.to(tl.int32), mask=keep)
    sound = tl.load(sound_ptr + offs, mask=keep, other=0.0)
    tl.store(host_ptr + capacity + offs, sound.to(tl.int32, bitcast=True), mask=keep)
    sound = tl.load(sound_too_ptr + offs, mask=keep, other=0.0)
    tl.store(host_ptr + 2 * capacity + offs, sound.to(tl.int32, bitcast=True), mask=keep)


def tell_step(
    chosen_R: torch.Tensor, sound_R: torch.Tensor, sound_too_R: torch.Tensor, tokens_R: torch.Tensor, host: torch.Tensor
) -> None:
    """Chosen tokens (int64) to `tokens_R`, which may be the same tensor, and to the first row of `host`, (3, most rows)
    int32 in pinned memory; to its other rows the bits of two fp32 tensors. All but `host` are (R,)."""
    num_rows = len(chosen_R)
    tell_kernel[(triton.cdiv(num_rows, _BLOCK),)](
        chosen_R, sound_R, sound_too_R, tokens_R, host, num_rows, host.shape[1], BLOCK=_BLOCK
    )
