"""The barriers of the FP8 kernel for many rows: its text runs on threads, in many orders, without a GPU."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from cluster.engine.kernels.triton import fp8_rings, linear_hopper
from tests.unit.barrier_machine import Box, Hazard, Tile
from tests.unit.gluon_on_threads import ANYTHING, check_many, check_stored, matrix, rewritten, run_program


class Shape(NamedTuple):
    num_rows: int
    outputs: int
    num_groups: int
    block_n: int
    silu_mul: bool
    x_stages: int
    w_stages: int
    lead: int
    parts: int
    programs: int
    chain: int = 1


FUNCTIONS: dict[str, Any] = {
    **{
        name: getattr(fp8_rings, name)
        for name in ("next_stage", "_produce_x", "_produce_w", "_free", "_consume", "fp8_rings_kernel")
    },
    "_tile_of": linear_hopper._tile_of,
    "_store": linear_hopper._store,
    "_store_part": linear_hopper._store_part,
}
OTHERS: dict[str, Any] = {
    "tl": SimpleNamespace(minimum=min),
    "_again": lambda value: value,
    "_now": lambda sums: sums,
    "_halves": Tile.halves,
    "_channel_scales": lambda *_: None,
    "_scaled": lambda acc, *_: acc,
    "_with_bias": lambda y, *_: y,
    "silu_mul": Tile.__add__,
}


def stored(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> list[tuple[Box, Tile]]:
    """By all programs."""
    arguments = {
        "x_desc": matrix("x", 64, 128, 1), "w_desc": matrix("w", 128, 128, 1),
        "out_desc": matrix("out", 64, 128 // shape.parts, 1), "x_scale_ptr": ANYTHING, "w_scale_ptr": ANYTHING,
        "bias_ptr": None, "M": shape.num_rows, "N": shape.outputs, "num_groups": shape.num_groups,
        "stride_x_scale": 1, "BLOCK_N": shape.block_n, "GROUP_M": 2, "HAS_BIAS": False, "SILU_MUL": shape.silu_mul,
        "SCALE_ROWS": 0, "X_STAGES": shape.x_stages, "W_STAGES": shape.w_stages, "LEAD": shape.lead,
        "CHAIN": shape.chain,
    }  # fmt: skip
    found = []
    for program in range(shape.programs):
        found += run_program(functions, OTHERS, "fp8_rings_kernel", arguments, program, shape.programs, seed + program)
    return found


def expected(shape: Shape) -> dict[Box, tuple[tuple[Box, Box], ...]]:
    """Products of each part of the result, in order."""
    boxes: dict[Box, tuple[tuple[Box, Box], ...]] = {}
    part = 128 // shape.parts
    for row in range(0, -(-shape.num_rows // 128) * 128, 64):
        for first in range(0, -(-shape.outputs // shape.block_n) * shape.block_n, 128):
            starts = (first, first + shape.outputs) if shape.silu_mul else (first,)
            products = tuple(
                (("x", row, 128 * group), ("w", start, 128 * group))
                for start in starts
                for group in range(shape.num_groups)
            )
            for column in range(first, first + 128, part):
                boxes["out", row, column] = products
    return boxes


def check(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> None:
    check_stored(stored(shape, seed, functions), expected(shape), 128)


def any_shape(random_: random.Random) -> Shape:
    num_rows, block_n, silu_mul = random_.choice((1, 64, 65, 129, 300)), random_.choice((128, 256)), False
    if block_n == 128:
        silu_mul = random_.random() < 0.5
    chain = random_.choice((1, 1, 2, 4))
    outputs, num_groups = random_.choice((40, 128, 300, 520)), chain * random_.randint(1, 9 // chain)
    tiles = -(-num_rows // 128) * -(-outputs // block_n)
    w_stages = random_.randint(min(2, chain), 7)
    lead = min(random_.randint(0, w_stages - 1), num_groups)  # as it is launched
    return Shape(
        num_rows, outputs, num_groups, block_n, silu_mul, random_.randint(chain, 6), w_stages, lead,
        random_.choice((1, 2, 4)), random_.randint(1, tiles), chain,
    )  # fmt: skip


@pytest.mark.parametrize("block", range(10))
def test_every_order_of_events_ends_and_multiplies_what_belongs_together(block: int) -> None:
    check_many(check, any_shape, 30, block)


MISTAKES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "freed before its product": (
        "_consume",
        [("warpgroup_mma_wait(1, deps=[part])", "warpgroup_mma_wait(2, deps=[part])")],
    ),
    "a buffer of a chain is kept": ("_consume", [("if i > 0:", "if i > 1:")]),
    "x freed by the first half": ("_free", [("if is_x_free:", "if True:")]),
    "the second half on other x": ("_consume", [("_again(first_x_stage)", "x_stage")]),
    "x waits for a buffer that nobody had": ("_produce_x", [("phase = 1", "phase = 0")]),
    "x counted as W": (
        "_consume",
        [("next_stage(x_stage, x_phase, X_STAGES)", "next_stage(x_stage, x_phase, W_STAGES)")],
    ),
    "W waits for one consumer": (
        "fp8_rings_kernel",
        [("w_free.index(stage), count=2", "w_free.index(stage), count=1")],
    ),
    "W is expected in part": (
        "_produce_w",
        [("ready.index(stage), 128 * GROUP_K", "ready.index(stage), 64 * GROUP_K")],
    ),
    "W of the other half": ("_produce_w", [("column + half *", "column + (1 - half) *")]),
    "a chain of one group": ("_produce_w", [("(group + i) * GROUP_K", "group * GROUP_K")]),
    "stored over what leaves": ("_store_part", [("tma.store_wait(0)", "pass")]),
    "no fence": ("_store_part", [("fence_async_shared()", "pass")]),
    "ends before its stores": ("_consume", [("tma.store_wait(0)", "pass")]),
    "the first consumer waits for itself": (
        "_consume",
        [("if WHICH == 1 and LEAD > 0:", "if WHICH == 0 and LEAD > 0:")],
    ),
    "the phase does not turn": ("next_stage", [("phase ^ 1", "phase")]),
}


@pytest.mark.parametrize(("name", "changes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_protocol_is_found(name: str, changes: list[tuple[str, str]], tmp_path: Path) -> None:
    functions = rewritten(FUNCTIONS, name, changes, tmp_path)
    with pytest.raises((Hazard, AssertionError)):
        check_many(partial(check, functions=functions), any_shape, 60, 7)


def test_a_lead_that_one_consumer_cannot_take_alone_would_never_end(tmp_path: Path) -> None:
    """Hence the assertion: the first consumer frees its sixth buffer with the product of a seventh, for which six
    stages have no room."""
    shape = Shape(128, 128, 8, 128, False, 4, 6, 5, 1, 1, chain=4)
    check(shape, 1)
    unchecked = "gl.static_assert(LEAD < W_STAGES and (W_STAGES > 1 or CHAIN == 1))", "pass"
    functions = rewritten(FUNCTIONS, "fp8_rings_kernel", [unchecked], tmp_path)
    with pytest.raises(Hazard, match="wait for ever"):
        check(shape._replace(lead=6), 1, functions)
