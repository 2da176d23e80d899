"""The barriers of prefill attention on warp groups: its text runs on threads, in many orders, without a GPU."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from cluster.engine.kernels.triton import attention_hopper
from tests.unit.barrier_machine import Barrier, Buffer, Hazard, Machine
from tests.unit.gluon_on_threads import ANYTHING, check_many, memory_barriers, rewritten, with_globals

ROWS_PER_TILE, BLOCK_KV, BLOCK_SIZE = 32, 64, 128
ROWS_PER_BLOCK, ROWS_OF_KV, ROWS_OF_HEAD, STRIDE_TABLE = 10_000, 5_000, 128, 64
NAMES = ("_first_visible", "next_stage", "_blocks", "_following", "_produce", "_consume", "prefill_hopper_kernel")
FUNCTIONS: dict[str, Any] = {name: getattr(attention_hopper, name) for name in NAMES}
COUNT, COUNTER = 5, 6  # in the first record


class Whole(int):
    """A loaded integer."""

    def to(self, dtype: object) -> Whole:
        return self


class Pointer(NamedTuple):
    memory: list[int]
    at: int = 0

    def __add__(self, offset: int) -> Pointer:  # type: ignore[override]
        return Pointer(self.memory, self.at + offset)


class Shape(NamedTuple):
    """`sequences`: (rows, context) of each."""

    sequences: tuple[tuple[int, int], ...]
    num_kv_heads: int
    stages: int
    programs: int
    window: int | None

    def tiles(self) -> list[list[int]]:
        """Records as `attention.list_tiles_kernel` makes them."""
        found = [
            [sequence, first_row, 0, rows, context, 0, 0, 0]
            for sequence, (rows, context) in enumerate(self.sequences)
            for first_row in range(0, rows, ROWS_PER_TILE)
        ][::-1]
        found[0][COUNT] = len(found)
        return found


class Computed(NamedTuple):
    """What a consumer multiplied for an item: rows of the cache, in order."""

    q: object
    keys: tuple[int, ...]
    values: tuple[int, ...]


class Program:
    """Runs the kernel once, with names that stand for what a GPU does."""

    def __init__(self, shape: Shape, memory: list[int], program: int, seed: int) -> None:
        self.computed: list[Computed] = []
        self._shape, self._memory, self._program = shape, memory, program
        self._machine = Machine(seed)
        self._products: dict[int, list[tuple[Any, Any]]] = {}  # by thread
        self._copies: dict[int, int] = {}  # on their way, by thread

    def run(self, functions: dict[str, Any]) -> None:
        machine, shape = self._machine, self._shape
        names: dict[str, Any] = {
            "gl": self._language(),
            "mbarrier": memory_barriers(machine),
            "async_load": machine.load,
            "fence_async_shared": lambda: None,
            "barrier": lambda: None,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._multiplied,
            "async_copy": SimpleNamespace(wait_group=self._wait_for_copies),
            "_request_rows": self._request_rows,
            "_softmax": lambda *_: (ANYTHING, ANYTHING, ANYTHING),
            "_fold": lambda *_: (ANYTHING, ANYTHING, ANYTHING),
            "_zero_stale_values": lambda *_: None,
            "_CLAIMED_ROUNDS": 2,
            **dict.fromkeys(("lane_sums", "total", "wide", "quotient"), lambda *_: ANYTHING),
        }
        tables = Pointer(list(range(STRIDE_TABLE * len(shape.sequences))))
        box = SimpleNamespace(shape=[BLOCK_KV, 1], nbytes=BLOCK_KV)
        with_globals(functions, names)["prefill_hopper_kernel"](
            q_ptr=ANYTHING, kv_desc=SimpleNamespace(name="kv", block_type=box, layout=None), out_ptr=ANYTHING,
            tiles_ptr=Pointer(self._memory), table_ptr=tables, window=shape.window, scale_log2=1.0, stride_q=1,
            stride_out=1, stride_table=STRIDE_TABLE, rows_per_block=ROWS_PER_BLOCK, rows_of_kv=ROWS_OF_KV,
            rows_of_head=ROWS_OF_HEAD, NUM_KV_HEADS=shape.num_kv_heads, GROUP=128 // ROWS_PER_TILE, D=64,
            BLOCK_KV=BLOCK_KV, SPLIT_KEYS=512, BLOCK_SIZE=BLOCK_SIZE, STAGES=shape.stages,
        )  # fmt: skip

    def _language(self) -> SimpleNamespace:
        def of_numbers(function: Callable[..., int]) -> Callable[..., Any]:
            return lambda a, b: function(a, b) if isinstance(a, int) and isinstance(b, int) else ANYTHING

        def allocate(dtype: object, shape: list[int], layout: object) -> Any:
            return Barrier() if dtype is int and len(shape) == 1 else self._machine.allocate(dtype, shape, layout)

        def allocate_item(dtype: object, shape: list[int], layout: object) -> Any:
            return _Slot() if dtype is _Slot else allocate(dtype, shape, layout)

        made_up = (
            "arange", "expand_dims", "zeros", "zeros_like", "convert_layout", "fma", "NVMMADistributedLayout",
            "SliceLayout", "DotOperandLayout", "BlockedLayout", "NVMMASharedLayout", "SwizzledSharedLayout",
        )  # fmt: skip
        return SimpleNamespace(
            program_id=lambda axis: self._program,
            num_programs=lambda axis: self._shape.programs,
            constexpr=lambda value: value,
            static_range=range,
            minimum=of_numbers(min),
            maximum=of_numbers(max),
            where=lambda condition, a, b: (a if condition else b) if isinstance(a, int) else ANYTHING,
            full=lambda shape, value, *_: value if shape == [1] else ANYTHING,
            sum=lambda value, axis: value,
            load=lambda pointer, **_: Whole(pointer.memory[pointer.at]) if isinstance(pointer, Pointer) else ANYTHING,
            store=self._store,
            atomic_add=self._atomic_add,
            allocate_shared_memory=allocate_item,
            warp_specialize=lambda parts, *_: self._machine.run([partial(part, *words) for part, words in parts]),
            int32=_Slot,
            int64=int,
            float32=float,
            **dict.fromkeys(made_up, lambda *_, **__: ANYTHING),
        )

    def _atomic_add(self, pointer: Pointer, value: int, sem: str) -> Whole:
        self._machine.wait()
        before = pointer.memory[pointer.at]
        pointer.memory[pointer.at] = before + value
        return Whole(before)

    def _store(self, pointer: Any, value: Any, mask: Any = None) -> None:
        """Of the result, by a consumer: an item has ended."""
        if isinstance(pointer, Pointer):
            pointer.memory[pointer.at] = value
            return
        products = self._products.pop(threading.get_ident())
        (q,) = {q for q, _ in products if q is not None}
        keys = tuple(box[1] for q, box in products if q is not None)
        values = tuple(box[1] for q, box in products if q is None)
        self.computed.append(Computed(q, keys, values))

    def _request_rows(self, q_ptr: Any, buffer: Buffer, tiles_ptr: Any, item: int, *_: object) -> None:
        buffer.write("rows on their way")
        thread = threading.get_ident()
        self._copies[thread] = self._copies.get(thread, 0) + 1

        def land() -> None:
            buffer.write(("q", int(item)))
            self._copies[thread] -= 1

        self._machine.finish_later(land)

    def _wait_for_copies(self, most: int) -> None:
        thread = threading.get_ident()
        self._machine.wait(lambda: self._copies[thread] <= most)

    def _multiply(self, x: Any, y: Buffer, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        operands = [buffer for buffer in (x, y) if isinstance(buffer, Buffer)]
        for buffer in operands:
            buffer.readers += 1
        product = SimpleNamespace(q=x if isinstance(x, Buffer) else None, other=y, operands=operands)
        return product if is_async else self._multiplied(0, [product])

    def _multiplied(self, most: int, deps: list[Any]) -> Any:
        self._machine.wait()
        for product in deps:
            if isinstance(product, SimpleNamespace):
                q = None if product.q is None else product.q.holds
                if not isinstance(product.other.holds, tuple) or isinstance(q, str):
                    raise Hazard(f"a product of {q} and {product.other.holds}")
                self._products.setdefault(threading.get_ident(), []).append((q, product.other.holds))
                for buffer in product.operands:
                    buffer.readers -= 1
        return ANYTHING if len(deps) == 1 else tuple(ANYTHING for _ in deps)


class _Slot:
    """A number in shared memory, which one thread writes and others read between barriers."""

    def __init__(self) -> None:
        self._value = 0

    def store(self, value: int) -> None:
        self._value = value

    def load(self, layout: object) -> int:
        return self._value


@pytest.fixture(autouse=True)
def buffers_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "load", lambda self, layout: ANYTHING, raising=False)


def expected(shape: Shape) -> list[Computed]:
    """By both consumers."""
    tiles, found = shape.tiles(), []
    for item in range(len(tiles) * shape.num_kv_heads):
        head, (sequence, first_row, _, rows, context, *_) = item // len(tiles), tiles[item % len(tiles)]
        position = context - rows + first_row
        first = 0 if shape.window is None else max(position - shape.window + 1, 0) // BLOCK_KV
        places = [
            (sequence * STRIDE_TABLE + start // BLOCK_SIZE) * ROWS_PER_BLOCK + head * ROWS_OF_HEAD + start % BLOCK_SIZE
            for start in range(first * BLOCK_KV, min(position + ROWS_PER_TILE, context), BLOCK_KV)
        ]
        found += 2 * [Computed(("q", item), tuple(places), tuple(place + ROWS_OF_KV for place in places))]
    return found


def check(shape: Shape, seed: int, functions: dict[str, Any] = FUNCTIONS) -> None:
    memory = [word for record in shape.tiles() for word in record]
    found = []
    for number in range(shape.programs):
        program = Program(shape, memory, number, seed + number)
        program.run(functions)
        found += program.computed
    assert sorted(found) == sorted(expected(shape))
    assert memory[COUNTER] == 0


def any_shape(random_: random.Random) -> Shape:
    sequences = []
    for _ in range(random_.randint(1, 3)):
        context = random_.randint(1, 700)
        sequences.append((random_.randint(1, context), context))
    return Shape(
        tuple(sequences), random_.randint(1, 3), random_.randint(2, 4), random_.randint(1, 5),
        random_.choice((None, None, 40, 200)),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(6))
def test_every_item_is_computed_once_from_its_own_blocks_in_any_order_of_events(block: int) -> None:
    check_many(check, any_shape, 8, block)


MISTAKES = {
    "keys never freed": (
        "_consume",
        "            mbarrier.arrive(k_free.index(stage), count=1)\n            block = first_block + i\n",
        "            block = first_block + i\n",
    ),
    "values freed before their product": (
        "_consume",
        "            acc, _ = warpgroup_mma_wait(0, deps=[acc_token, p_operand])\n            barrier()\n"
        "            mbarrier.arrive(v_free.index(v_stage), count=1)\n",
        "            mbarrier.arrive(v_free.index(v_stage), count=1)\n"
        "            acc, _ = warpgroup_mma_wait(0, deps=[acc_token, p_operand])\n",
    ),
    "values of another phase": (
        "_consume",
        "            v_stage = stage\n            v_phase = phase\n            stage, phase",
        "            v_stage = stage\n            stage, phase",
    ),
    "the last values never freed": (
        "_consume",
        "        mbarrier.arrive(v_free.index(v_stage), count=1)\n        M",
        "        M",
    ),
    "a parity that never changes": ("next_stage", "phase ^ 1", "phase"),
    "rows multiplied before they arrived": ("_consume", "        async_copy.wait_group(0)\n", ""),
    "rows asked for while the ones before are read": (
        "_consume",
        "        masked = whole_to <= 0\n",
        "        _request_rows(q_ptr, q_buffer, tiles_ptr, item, num_tiles, stride_q, WHICH, GROUP, ROWS_PER_TILE, D)\n"
        "        masked = whole_to <= 0\n",
    ),
    "an item published over one that is not read": ("_produce", "        mbarrier.wait(item_free, item_phase)\n", ""),
    "an item read before it is there": ("_consume", "        mbarrier.wait(item_ready, item_phase)\n", ""),
    "an item left out": ("_following", "following = item + programs", "following = item + programs + 1"),
    "an item that nobody claims": (
        "_following",
        "following = num_shared_out + num_claimed",
        "following = num_shared_out + num_claimed + 1",
    ),
    "a counter that stays": ("_following", "+ programs - 1:", "+ programs:"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    name, old, new = MISTAKES[mistake]
    functions = rewritten(FUNCTIONS, name, [(old, new)], tmp_path)
    with pytest.raises(AssertionError):  # hazards are
        check_many(partial(check, functions=functions), any_shape, 60, 7)
