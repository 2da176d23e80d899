"""How an FP8 product is launched for a shape. Data, chosen by measurement; a plan never decides bits.

One thing would: on Hopper `wgmma` accumulates e4m3 products with fewer bits than `mma.sync`, and Triton
takes `mma.sync` where a tile is too small for the other. So a plan whose tile is that small is refused
here, when it is made.
"""

from __future__ import annotations

from typing import Literal

import msgspec

_WGMMA_ROWS = 64  # the tall side of every wgmma instruction


class Fp8Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, cache_hash=True):
    """One way to compute an FP8 GEMM; every step along K is one group of 128.

    `block_m` counts rows of x and `block_n` outputs of a tile (of each half, with SwiGLU). `swap` puts the
    weight on the tall side of the instruction, for few rows.

    chain     loads through pointers
    tma       loads through the bulk copy engine
    rings     many rows: two consumer warp groups, x and W in rings of their own; 128 rows of x, 128 or 256 outputs
    stream    few rows: a producer warp fills a deep ring, one warp group sums four groups side by side
    library   torch._scaled_mm, where its bits were admitted
    separate  SwiGLU only: the plain product by its own plan, then one kernel that quantises too
    """

    kind: Literal["chain", "tma", "rings", "stream", "library", "separate"] = "chain"
    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    swap: bool = False
    evict_first: bool = False  # chain: do not keep weights in L2
    persistent: bool = True  # tma, rings: as many programs as multiprocessors
    flatten: bool = False  # tma: overlap a tile's store with the next tile's loads
    store_parts: int = 1  # tma, rings: 1 or 2; of 128 columns in rings, one buffer after the other
    x_stages: int = 4  # rings: buffers of 64 x 128 for each consumer; `num_stages` are those of W, 128 x 128 each
    lead: int = 0  # rings: buffers of W that one consumer is ahead of the other, less than num_stages

    def __post_init__(self) -> None:
        tall, narrow = (self.block_n, self.block_m) if self.swap else (self.block_m, self.block_n)
        if self.kind in ("chain", "tma"):
            if tall < _WGMMA_ROWS or self.num_warps not in (4, 8):
                raise ValueError(f"{self}: wgmma needs a tall side of 64 or more, and 4 or 8 warps")
            if not 16 <= narrow <= 256 or narrow & (narrow - 1) or tall & (tall - 1):
                raise ValueError(f"{self}: tile sides are powers of two, the narrow one from 16 to 256")
        if self.kind == "rings":
            self._check_rings()
        if self.kind == "stream" and (self.block_n != 64 or self.block_m not in (8, 16, 32, 64)):
            raise ValueError(f"{self}: the streaming kernel has 64 outputs and 8, 16, 32 or 64 rows to a tile")

    def _check_rings(self) -> None:
        if self.block_m != 128 or self.block_n not in (128, 256) or self.store_parts not in (1, 2):
            raise ValueError(f"{self}: tiles of the rings are 128 x 128 and 128 x 256, stored in 1 or 2 parts")
        if self.x_stages < 1 or self.num_stages < 2 or not 0 <= self.lead < self.num_stages:
            raise ValueError(f"{self}: x_stages must be 1 at least, num_stages 2 at least and more than lead")


REFERENCE_FP8 = Fp8Plan(num_stages=1)


def fitting(plan: Fp8Plan, scale_rows: int, *, silu_mul: bool, chain: int = 1) -> Fp8Plan:
    """`plan`, or its like where SwiGLU, which counts gate and up columns each, or block scales (`scale_rows` rows
    of W to a scale, 0: none) leave the warp groups too few registers, or x of a chain does not fit its ring."""
    if plan.kind != "rings":
        return plan
    if scale_rows not in (0, 128) or (scale_rows and silu_mul):
        return Fp8Plan(kind="tma", block_m=128, block_n=64, num_warps=8, num_stages=4)
    if scale_rows or silu_mul:
        plan = msgspec.structs.replace(plan, block_n=128)
    if chain > plan.x_stages:
        plan = msgspec.structs.replace(plan, x_stages=chain, num_stages=8, lead=min(plan.lead, 7), store_parts=2)
    return plan


UNMEASURED_FP8: tuple[tuple[int, Fp8Plan], ...] = (
    (16, Fp8Plan(block_m=16, block_n=64, num_stages=8, swap=True, evict_first=True)),
    (32, Fp8Plan(block_m=32, block_n=64, num_stages=8, swap=True, evict_first=True)),
    (64, Fp8Plan(block_m=64, block_n=64, num_stages=6, swap=True, evict_first=True)),
    (1 << 30, Fp8Plan(block_m=128, block_n=64, num_warps=8, num_stages=4)),
)


def unmeasured_plan(num_rows: int) -> Fp8Plan:
    """A chain that runs for any shape, scaling and epilogue."""
    return next(plan for max_rows, plan in UNMEASURED_FP8 if num_rows <= max_rows)
