"""How a kernel is launched for a shape: tiles, warps, pipeline depth. Data, chosen by measurement.

A plan never decides bits: every plan of an operation was admitted against the reference. What does
decide bits is here as constants, a function of the model alone: `SPLIT_KEYS` and `block_kv`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SPLIT_KEYS = 512  # keys per attention split, counted from position 0
VOCABULARY_CHUNK = 4096  # logits per partial sum of exponentials, counted from id 0


def block_kv(head_size: int) -> int:
    """Keys per online-softmax block; part of the canonical order."""
    return 64


LinearKind = Literal["chain", "tma", "cublaslt", "stream", "hopper"]


class LinearPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """One way to compute a GEMM. `swap` puts the weight on the wide side of the instruction (few rows).

    stream (`linear_stream.py`): rows of a tile are 8 or more with `swap`, else 64, or a multiple of 16 up to 32 for
    the warps' own instruction, which wants `block_n` >= 8 columns per warp. Tiles of 64 rows without `swap` and
    SwiGLU may have a `block_n` that is the sum of two powers of two, each 16 at least: 48, 80, 96.
    hopper (`linear_hopper.py`): tiles of 128, 192 or 256 rows and of up to 256 columns (128 rows) or 128, where
    `block_n` counts gate and up columns together; `block_k` is 64, and warps are fixed.
    """

    kind: LinearKind = "chain"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    swap: bool = False
    evict_first: bool = False  # chain: do not keep weights in L2
    persistent: bool = True  # tma, stream: as many programs as multiprocessors, or a multiple
    programs_per_multiprocessor: int = 1  # stream
    launch_first: bool = True  # stream: the next kernel is set up before this one waits, not after
    flatten: bool = False  # tma: overlap a tile's store with the next tile's loads
    warp_specialize: bool = False
    store_parts: int = 1  # tma, hopper: 1 or 2; twice as many for fp32 results

    def __post_init__(self) -> None:
        if self.kind == "stream":
            self._check_stream()
        if self.kind == "hopper" and (
            self.block_m not in (128, 192, 256)
            or self.block_n not in (32, 64, 128, 256)
            or self.block_k != 64
            or self.num_stages < 2
        ):
            raise ValueError(
                f"{self}: tiles of 128, 192 or 256 rows, up to 256 columns and K of 64, two stages at least"
            )

    def _check_stream(self) -> None:
        if self.swap:
            is_tile = self.block_m in (8, 16, 32, 64, 128, 256) and self.block_n in (64, 128)
        elif self.block_m == 64:
            is_tile = 16 <= self.block_n <= 256 and self.block_n.bit_count() <= 2 and self.block_n % 16 == 0
        else:
            is_tile = self.block_m in (16, 32) and self.block_n >= 8 * self.num_warps and self.block_n.bit_count() == 1
        if not is_tile:
            raise ValueError(f"{self}: the streaming kernel has no such tile")


REFERENCE_LINEAR = LinearPlan(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=1)


class AttentionPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """Tiles of the two attention paths."""

    few_rows_kind: Literal["split", "tiled"] = "split"  # tiled: sequences of few rows go the way of all others
    split_block_rows: int = 64  # rows x grouped heads of a sequence served by the split kernels
    split_num_warps: int = 4
    split_num_stages: int = 3
    split_programs_per_multiprocessor: int = 2
    split_rope_up_to: int = 0  # sequences of a row and a split each: the split kernel rotates and stores K and V, too
    prefill_kind: Literal["tiled", "hopper"] = "tiled"  # hopper: warp groups, where shapes allow
    prefill_block_rows: int = 64
    prefill_num_warps: int = 4
    prefill_num_stages: int = 3
    prefill_use_tma: bool = False  # tiled only


REFERENCE_ATTENTION = AttentionPlan(few_rows_kind="tiled", prefill_block_rows=16, prefill_num_stages=1)


class LatentPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """Tiles of the two paths of latent attention. Rows of a tile are (row, head) pairs.

    A multiprocessor's registers hold 64 x 512 accumulators once: the split kernel needs one set, the prefill
    kernel two, which therefore is started twice, each time for half of the value.
    """

    few_rows_kind: Literal["split", "tiled"] = "split"  # as of `AttentionPlan`
    split_block_rows: int = 64
    split_halves: bool = False
    split_num_warps: int = 8
    split_num_stages: int = 2
    split_programs_per_multiprocessor: int = 1
    prefill_block_rows: int = 64
    prefill_halves: bool = True
    prefill_num_warps: int = 8
    prefill_num_stages: int = 2


REFERENCE_LATENT = LatentPlan(
    few_rows_kind="tiled", prefill_block_rows=16, prefill_halves=False, prefill_num_stages=1
)  # fmt: skip
