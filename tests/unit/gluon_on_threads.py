"""Runs the text of a Gluon kernel on `barrier_machine`: its functions get other globals."""

from __future__ import annotations

import inspect
import random
import runpy
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

from tests.unit.barrier_machine import Barrier, Box, Machine, Tile

Shape = TypeVar("Shape")
Check = Callable[[Shape, int], None]  # of a shape, with a seed


class Anything:
    """Scales, offsets and pointers: nothing that the barriers depend on."""

    dtype = SimpleNamespace(element_ty=None)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def _same(self, *_: object) -> Anything:
        return self

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _same
    __and__ = __or__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = _same


ANYTHING: Any = Anything()


def memory_barriers(machine: Machine) -> SimpleNamespace:
    """Gluon's `mbarrier`."""

    def arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.arrive()

    return SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: setattr(barrier, "count", count),
        expect=lambda barrier, num_bytes: barrier.arrive(num_bytes),
        arrive=arrive,
        wait=lambda barrier, phase: machine.wait(lambda: barrier.phase & 1 != phase),
    )


def _static_assert(condition: bool) -> None:
    assert condition


def with_globals(functions: Mapping[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """`names` with the functions, which call each other and these names."""
    for name, function in functions.items():
        names[name] = FunctionType(function.fn.__code__, names, name, function.fn.__defaults__)
    return names


def rewritten(
    functions: Mapping[str, Any], name: str, changes: Sequence[tuple[str, str]], directory: Path
) -> dict[str, Any]:
    """The functions, one of them with other text."""
    text = textwrap.dedent(inspect.getsource(functions[name].fn))
    text = text[text.index("def ") :]
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = directory / "rewritten.py"
    file.write_text(f"from __future__ import annotations\n{text}")
    return {**functions, name: SimpleNamespace(fn=runpy.run_path(str(file))[name])}


def matrix(name: str, rows: int, columns: int, itemsize: int) -> SimpleNamespace:
    """A descriptor of boxes."""
    box = SimpleNamespace(shape=[rows, columns], nbytes=rows * columns * itemsize)
    return SimpleNamespace(name=name, block_type=box, dtype=None, layout=None)


def check_stored(found: Sequence[tuple[Box, Tile]], wanted: Mapping[Box, object], columns: int) -> None:
    """Each part of the result once, the sum of its own products in order. `columns` of a tile."""
    assert len(found) == len(wanted)
    assert {box: tile.products for box, tile in found} == wanted
    assert all(tile.columns[0] == box[2] % columns for box, tile in found)


def check_many(check: Check[Shape], any_shape: Callable[[random.Random], Shape], count: int, seed: int) -> None:
    """Shapes and orders of events, drawn from the seed."""
    random_ = random.Random(seed)
    for _ in range(count):
        check(any_shape(random_), random_.randrange(1 << 30))


Others = Mapping[str, Any] | Callable[[Machine], Mapping[str, Any]]


def run_program(
    functions: Mapping[str, Any], others: Others, kernel: str, arguments: Mapping[str, Any],
    program: int, programs: int, seed: int, *, is_specialized: bool = True,
) -> list[tuple[Box, Tile]]:  # fmt: skip
    """What one program stores. `functions` run as they are written, `others` as they are given. A kernel that is not
    specialised is one partition: its threads do everything together."""
    machine = Machine(seed, has_predecessor=arguments.get("PDL", False))

    def specialize(parts: list[tuple[Callable[..., None], tuple[object, ...]]], *_: object) -> None:
        machine.run([partial(function, *args) for function, args in parts])

    names: dict[str, Any] = {
        "gl": SimpleNamespace(
            program_id=lambda axis: program,
            num_programs=lambda axis: programs,
            constexpr=lambda value: value,
            static_range=range,
            static_assert=_static_assert,
            minimum=lambda a, b: min(a, b) if isinstance(a, int) and isinstance(b, int) else ANYTHING,
            where=lambda condition, a, b: a if condition else b,
            cdiv=lambda a, b: -(-a // b),
            zeros=lambda shape, *_: Tile(columns=(0, shape[1])),
            fma=lambda part, scale, acc: acc + part,
            allocate_shared_memory=machine.allocate,
            warp_specialize=specialize,
            int64=int,
            float32=float,
            **dict.fromkeys(
                ("load", "arange", "expand_dims", "zeros_like", "NVMMADistributedLayout", "SliceLayout"),
                lambda *_, **__: ANYTHING,
            ),
        ),
        "mbarrier": memory_barriers(machine),
        "tma": SimpleNamespace(store_wait=machine.store_wait),
        "async_load": machine.load,
        "gdc_wait": machine.wait_for_predecessor,
        "gdc_launch_dependents": lambda: None,
        "async_store": machine.store,
        "fence_async_shared": machine.fence,
        "barrier": lambda: None,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.product_wait,
        **(others(machine) if callable(others) else others),
    }
    run = partial(with_globals(functions, names)[kernel], **arguments)
    if is_specialized:
        run()
    else:
        machine.run([run])
    return machine.stores
