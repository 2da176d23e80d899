"""The barriers of the GEMM for many rows: its text runs on threads, in many orders, without a GPU."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from cluster.engine.kernels.triton import linear_hopper
from tests.unit.barrier_machine import Box, Hazard, Many, Pair, Tile
from tests.unit.gluon_on_threads import check_many, check_stored, matrix, rewritten, run_program

BLOCK_K = 64
NAMES = (
    "_tile_of", "_request_rows", "_request_weights", "_produce", "_store_part", "_store", "_consume", "hopper_kernel",
)  # fmt: skip
FUNCTIONS: dict[str, Any] = {name: getattr(linear_hopper, name) for name in NAMES}


class Shape(NamedTuple):
    num_rows: int
    outputs: int
    inputs: int
    rows: int  # of one consumer
    consumers: int
    half: int  # columns, or of gate and of up
    stages: int
    parts: int
    silu_mul: bool
    pdl: bool
    programs: int

    @property
    def columns(self) -> int:
        """Of the result, of one tile."""
        return self.half if self.silu_mul else 2 * self.half


class Gate:
    """What `up` is multiplied with: the other half of the same sum."""

    def __init__(self, gate: Tile) -> None:
        self._gate = gate

    def __mul__(self, up: Tile) -> Tile:
        assert up.products == self._gate.products
        assert up.columns == (self._gate.columns[1], 2 * self._gate.columns[1])
        return self._gate


OTHERS: dict[str, Any] = {
    "tl": SimpleNamespace(minimum=min),
    "_halves": Tile.halves,
    "sigmoid_weighted": Gate,
    "reinterpret": lambda ring, *_: Many([Pair(*pair) for pair in zip(ring.items[::2], ring.items[1::2], strict=True)]),
}


def stored(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> list[tuple[Box, Tile]]:
    """By all programs."""
    arguments = {
        "x_desc": matrix("x", shape.rows, BLOCK_K, 2), "w_desc": matrix("w", shape.half, BLOCK_K, 2),
        "out_desc": matrix("out", shape.rows, shape.columns // shape.parts, 2), "bias_ptr": None, "M": shape.num_rows,
        "N": shape.outputs, "K": shape.inputs, "CONSUMERS": shape.consumers, "STAGES": shape.stages, "GROUP_M": 2,
        "HAS_BIAS": False, "SILU_MUL": shape.silu_mul, "PDL": shape.pdl,
    }  # fmt: skip
    found = []
    for program in range(shape.programs):
        found += run_program(functions, OTHERS, "hopper_kernel", arguments, program, shape.programs, seed + program)
    return found


def expected(shape: Shape) -> dict[Box, tuple[Any, ...]]:
    """Products of each part of the result, in order. K is padded to whole rounds of the ring."""
    boxes: dict[Box, tuple[Any, ...]] = {}
    tall, round_k = shape.rows * shape.consumers, BLOCK_K * shape.stages
    to_right = shape.outputs if shape.silu_mul else shape.half
    for row in range(0, -(-shape.num_rows // tall) * tall, shape.rows):
        for left in range(0, -(-shape.outputs // shape.columns) * shape.columns, shape.columns):
            products = tuple(
                (("x", row, k), (("w", left, k), ("w", left + to_right, k)))
                for k in range(0, -(-shape.inputs // round_k) * round_k, BLOCK_K)
            )
            for column in range(left, left + shape.columns, shape.columns // shape.parts):
                boxes["out", row, column] = products
    return boxes


def check(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> None:
    check_stored(stored(shape, seed, functions), expected(shape), shape.columns)


def any_shape(random_: random.Random) -> Shape:
    rows, consumers = random_.choice(((64, 2), (128, 2), (64, 3)))
    half, silu_mul = random_.choice((32, 64, 128)), random_.random() < 0.5
    num_rows, outputs = random_.choice((1, 64, 160, 192, 300)), random_.choice((40, 128, 300, 520))
    tiles = -(-num_rows // (rows * consumers)) * -(-outputs // (half if silu_mul else 2 * half))
    return Shape(
        num_rows, outputs, BLOCK_K * random_.randint(1, 9), rows, consumers, half, random_.randint(2, 6),
        random_.choice((1, 2, 4)), silu_mul, random_.random() < 0.5, random_.randint(1, tiles),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(6))
def test_every_order_of_events_ends_and_multiplies_what_belongs_together(block: int) -> None:
    check_many(check, any_shape, 30, block)


MISTAKES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "every tile without its first round": (
        "_produce",
        [("gl.where(tile == first_tile, BLOCK_K * STAGES, 0)", "BLOCK_K * STAGES")],
    ),
    "the first round twice": ("_produce", [("gl.where(tile == first_tile, BLOCK_K * STAGES, 0)", "0")]),
    "rows before the wait": ("_produce", [("gdc_wait()", "pass")]),
    "freed before its product": ("_consume", [("warpgroup_mma_wait(1, deps=[token])", "token")]),
    "a consumer forgotten": ("hopper_kernel", [("count=CONSUMERS", "count=2")]),
    "other rows": ("_request_rows", [("stage * CONSUMERS + which", "stage * CONSUMERS")]),
    "weights of the other half": ("_request_weights", [("[right, at]", "[left, at]")]),
    "the phase does not turn": ("_consume", [("phase ^= 1", "pass")]),
    "stored over what leaves": ("_store_part", [("tma.store_wait(0)", "pass")]),
    "no fence": ("_store_part", [("fence_async_shared()", "pass")]),
    "ends before its stores": ("_consume", [("    tma.store_wait(0)", "    pass")]),
}


@pytest.mark.parametrize(("name", "changes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_protocol_is_found(name: str, changes: list[tuple[str, str]], tmp_path: Path) -> None:
    functions = rewritten(FUNCTIONS, name, changes, tmp_path)
    with pytest.raises((Hazard, AssertionError)):
        check_many(partial(check, functions=functions), any_shape, 60, 7)
