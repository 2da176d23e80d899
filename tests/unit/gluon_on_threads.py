"""Runs the text of a warp-specialised Gluon kernel on `barrier_machine`: its functions get other globals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

from tests.unit.barrier_machine import Barrier, Box, Machine, Tile


class Anything:
    """Scales, offsets and pointers: nothing that the barriers depend on."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def _same(self, *_: object) -> Anything:
        return self

    __add__ = __radd__ = __iadd__ = __mul__ = __rmul__ = __lt__ = __and__ = __sub__ = _same


ANYTHING: Any = Anything()


def run_program(
    functions: Mapping[str, Any], others: Mapping[str, Any], kernel: str, arguments: Mapping[str, Any],
    program: int, programs: int, seed: int,
) -> list[tuple[Box, Tile]]:  # fmt: skip
    """What one program stores. `functions` run as they are written, `others` are called as they are given."""
    machine = Machine(seed)

    def specialize(parts: list[tuple[Callable[..., None], tuple[object, ...]]], *_: object) -> None:
        machine.run([partial(function, *args) for function, args in parts])

    def arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.arrive()

    def expect(barrier: Barrier, num_bytes: int) -> None:
        barrier.arrive(num_bytes)

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    names: dict[str, Any] = {
        "gl": SimpleNamespace(
            program_id=lambda axis: program,
            num_programs=lambda axis: programs,
            constexpr=lambda value: value,
            static_range=range,
            static_assert=lambda condition: None,
            minimum=lambda a, b: min(a, b) if isinstance(a, int) and isinstance(b, int) else ANYTHING,
            where=lambda condition, a, b: a if condition else b,
            zeros=lambda *_: Tile(),
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
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=init,
            expect=expect,
            arrive=arrive,
            wait=lambda barrier, phase: machine.wait(lambda: barrier.phase & 1 != phase),
        ),
        "tma": SimpleNamespace(store_wait=machine.store_wait),
        "async_load": machine.load,
        "async_store": machine.store,
        "fence_async_shared": machine.fence,
        "barrier": lambda: None,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.product_wait,
        **others,
    }
    for name, function in functions.items():
        names[name] = FunctionType(function.fn.__code__, names, name, function.fn.__defaults__)
    names[kernel](**arguments)
    return machine.stores
