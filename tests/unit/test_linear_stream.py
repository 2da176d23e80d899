"""What the GEMM for few rows loads, multiplies and stores: its text runs on a simulated copy engine, without a GPU."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from cluster.engine.kernels.triton import linear_stream
from tests.unit.barrier_machine import Hazard, Machine, Tile
from tests.unit.gluon_on_threads import check_many, matrix, rewritten, run_program

NAMES = ("_request_weight", "_request_rows", "_next", "_zeros", "_multiply", "_multiply_both", "stream_kernel")
FUNCTIONS: dict[str, Any] = {name: getattr(linear_stream, name) for name in NAMES}
BLOCK_K = 128
Products = tuple[tuple[tuple[str, int, int], tuple[str, int, int]], ...]


class Shape(NamedTuple):
    num_rows: int
    outputs: int
    inputs: int
    block_m: int
    block_n: int
    tail_n: int
    stages: int
    silu_mul: bool
    swap: bool
    launch_first: bool
    programs: int

    @property
    def tiles(self) -> int:
        return -(-self.num_rows // self.block_m) * -(-self.outputs // (self.block_n + self.tail_n))


def check(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> None:
    """Each part of the result is stored once, and is the sum of its own products in order."""
    found: list[tuple[int, int, int, Products, Products]] = []

    def others(machine: Machine) -> dict[str, Any]:
        def store(
            acc: Tile, up: Tile, bias: None, out: None, row: int, column: int, M: int, N: int, stride: int, SWAP: bool,
            HAS_BIAS: bool, SILU_MUL: bool,
        ) -> None:  # fmt: skip
            machine.check_may_store()
            found.append((row, column, acc.shape[1], acc.products, up.products if SILU_MUL else ()))

        return {"_store": store}

    arguments = {
        "x_desc": matrix("x", shape.block_m, BLOCK_K, 2), "w_desc": matrix("w", shape.block_n, BLOCK_K, 2),
        "tail_desc": matrix("w", shape.tail_n or shape.block_n, BLOCK_K, 2), "bias_ptr": None, "out_ptr": None,
        "M": shape.num_rows, "N": shape.outputs, "K": shape.inputs, "stride_out": shape.outputs,
        "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "TAIL_N": shape.tail_n, "BLOCK_K": BLOCK_K,
        "STAGES": shape.stages, "SWAP": shape.swap, "WARPGROUP": True, "ONE_ROW_TILE": shape.num_rows <= shape.block_m,
        "HAS_BIAS": False, "SILU_MUL": shape.silu_mul, "LAUNCH_FIRST": shape.launch_first, "PDL": True,
    }  # fmt: skip
    for program in range(shape.programs):
        run_program(
            functions, others, "stream_kernel", arguments, program, shape.programs, seed + program,
            is_specialized=False,
        )  # fmt: skip
    wanted = []
    for row in range(0, shape.num_rows, shape.block_m):
        for left in range(0, shape.outputs, shape.block_n + shape.tail_n):
            parts = [(left, shape.block_n)] + [(left + shape.block_n, shape.tail_n)] * (shape.tail_n > 0)
            for column, width in parts:
                up = products(shape, row, column + shape.outputs) if shape.silu_mul else ()
                wide = shape.block_m if shape.swap else width
                wanted.append((row, column, wide, products(shape, row, column), up))
    assert sorted(found) == sorted(wanted)


def products(shape: Shape, row: int, column: int) -> Products:
    pairs = ((("x", row, k), ("w", column, k)) for k in range(0, shape.inputs, BLOCK_K))
    return tuple(pair[::-1] if shape.swap else pair for pair in pairs)


def any_shape(random_: random.Random) -> Shape:
    silu_mul = random_.random() < 0.3
    block_n, tail_n = random_.choice(((64, 0), (32, 0)) if silu_mul else ((64, 0), (64, 16), (32, 16), (64, 32)))
    shape = Shape(
        random_.choice((1, 64, 130)), random_.choice((40, 80, 330, 512)), 64 * random_.randint(1, 12), 64, block_n,
        tail_n, random_.randint(1, 5), silu_mul, tail_n == 0 and random_.random() < 0.5, random_.random() < 0.5, 1,
    )  # fmt: skip
    return shape._replace(programs=random_.randint(1, shape.tiles))


def test_each_part_of_the_result_is_the_sum_of_its_own_products() -> None:
    check_many(check, any_shape, 80, 1)


MISTAKES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "the tail of the neighbour": ("_request_weight", [("row + BLOCK_N, k", "row, k")]),
    "tiles as wide as their first part": ("_request_weight", [("(BLOCK_N + TAIL_N)", "BLOCK_N")]),
    "too many tiles": ("stream_kernel", [("gl.cdiv(N, BLOCK_N + TAIL_N)", "gl.cdiv(N, BLOCK_N)")]),
    "bytes of the tail forgotten": ("stream_kernel", [("BLOCK_N + TAIL_N + BLOCK_M", "BLOCK_N + BLOCK_M")]),
    "rows before the wait": ("stream_kernel", [("        gdc_wait()\n", "        pass\n")]),
    "a part stored over the other": ("stream_kernel", [("row, column + BLOCK_N, M", "row, column, M")]),
    "gate for up": ("_request_weight", [("[N + row, k]", "[row, k]")]),
    "the phase does not turn": ("stream_kernel", [("phase ^= 1", "pass")]),
    "the next tile too early": ("_next", [("k >= K", "k + BLOCK_K >= K")]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(name: str, changes: list[tuple[str, str]], tmp_path: Path) -> None:
    functions = rewritten(FUNCTIONS, name, changes, tmp_path)
    with pytest.raises((Hazard, AssertionError)):
        check_many(partial(check, functions=functions), any_shape, 40, 3)
