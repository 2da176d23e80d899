"""A multiprocessor as far as barriers are concerned.

Memory barriers have phases, a copy engine finishes what it is asked for at any later time, buffers know what lies in
them, and products name what they multiplied. Partitions are threads. Every wait is a point where another one or the
copy engine may go on, chosen by a seed. What is found: waits that never end, buffers overwritten while they are read or
before they are stored, products of no block, and, of a kernel that is set up while the one before it runs, rows read or
results stored before that one has ended.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

Box = tuple[str, int, int]  # of a matrix: its name, first row, first column


class Hazard(AssertionError):
    """A race, a wait without end, or a product of what should not meet."""


class Barrier:
    """One mbarrier. A phase ends when its arrivals and its bytes are complete."""

    def __init__(self) -> None:
        self.count = 0
        self.arrived = 0
        self.num_bytes = 0
        self.phase = 0

    def arrive(self, num_bytes: int = 0) -> None:
        self.arrived += 1
        self.num_bytes += num_bytes
        if self.arrived > self.count:
            raise Hazard("more arrivals than a phase has")
        self._complete()

    def landed(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._complete()

    def _complete(self) -> None:
        if self.arrived == self.count and self.num_bytes == 0:
            self.arrived, self.phase = 0, self.phase + 1


class Buffer:
    """Shared memory of one box or one part of the result."""

    def __init__(self) -> None:
        self.holds: object = None
        self.readers = 0
        self.writer = 0  # the thread that stored into it
        self.is_fenced = False

    def write(self, what: object) -> None:
        if self.readers:
            raise Hazard(f"{what} overwrites {self.holds}, which is being read")
        self.holds, self.is_fenced = what, False

    def permute(self, order: list[int]) -> Buffer:
        return self

    def store(self, tile: Tile) -> None:
        self.write(tile)
        self.writer = threading.get_ident()


class Pair:
    """Two neighbouring buffers read as one."""

    def __init__(self, left: Buffer, right: Buffer) -> None:
        self._left, self._right = left, right

    def permute(self, order: list[int]) -> Pair:
        return self

    @property
    def holds(self) -> object:
        both = self._left.holds, self._right.holds
        return both if all(isinstance(each, tuple) for each in both) else None

    @property
    def readers(self) -> int:
        return self._left.readers

    @readers.setter
    def readers(self, count: int) -> None:
        self._left.readers = self._right.readers = count


class Many:
    """An array of barriers or buffers."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def index(self, at: int) -> Any:
        if not 0 <= at < len(self.items):
            raise Hazard(f"index {at} of {len(self.items)}")
        return self.items[at]


class Tile:
    """A sum of products, each named by the boxes of x and W; `columns` of it."""

    def __init__(self, products: tuple[tuple[Box, Box], ...] = (), columns: tuple[int, int] = (0, 128)) -> None:
        self.products, self.columns = products, columns
        self.shape = (64, columns[1] - columns[0])

    def __add__(self, other: Tile) -> Tile:
        return Tile(self.products + other.products, self.columns)

    def to(self, dtype: object) -> Tile:
        return self

    def halves(self) -> tuple[Tile, Tile]:
        first, last = self.columns
        middle = (first + last) // 2
        return Tile(self.products, (first, middle)), Tile(self.products, (middle, last))


class Product(NamedTuple):
    """Of several pairs of operands, on its way."""

    operands: list[tuple[Buffer, Buffer]]
    products: tuple[tuple[Box, Box], ...]
    columns: tuple[int, int]


class Machine:
    """One multiprocessor with one program. Partitions take turns at their waits, one at a time."""

    def __init__(self, seed: int, *, has_predecessor: bool = False) -> None:
        self._predecessor_runs = has_predecessor
        self.stores: list[tuple[Box, Tile]] = []
        self.buffers: list[Buffer] = []
        self._random = random.Random(seed)
        self._in_flight: list[Callable[[], None]] = []  # of the copy engine
        self._unread: dict[int, list[Buffer]] = {}  # by the thread that asked for the store
        self._turns: list[_Turn] = []
        if has_predecessor:
            self.finish_later(self._end_predecessor)

    def run(self, partitions: list[Callable[[], None]]) -> None:
        """Until all have ended. Weights make some of them slow for a whole run."""
        self._turns = turns = [_Turn(partition) for partition in partitions]
        weights = {id(turn): self._random.choice((0.02, 1.0, 1.0, 10.0)) for turn in turns}
        weights[id(self._in_flight)] = self._random.choice((0.02, 1.0, 10.0))
        try:
            while not all(turn.has_ended for turn in turns):
                ready = [turn for turn in turns if not turn.has_ended and turn.is_ready()]
                choices: list[Any] = [*ready, *([self._in_flight] if self._in_flight else [])]
                if not choices:
                    waiting = [index for index, turn in enumerate(turns) if not turn.has_ended]
                    raise Hazard(f"partitions {waiting} wait for ever")
                (chosen,) = self._random.choices(choices, [weights[id(choice)] for choice in choices])
                if chosen is self._in_flight:
                    self._in_flight.pop(self._random.randrange(len(self._in_flight)))()
                else:
                    chosen.go_on()
        finally:
            for turn in turns:
                turn.stop()
        if self._in_flight:
            raise Hazard("the program ends before its copies")

    def wait(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Of a partition, until it is its turn again."""
        next(turn for turn in self._turns if turn.thread is threading.current_thread()).wait(is_ready)

    def finish_later(self, action: Callable[[], None]) -> None:
        """Of what was asked for now: at any later time."""
        self._in_flight.append(action)

    def _end_predecessor(self) -> None:
        self._predecessor_runs = False

    def wait_for_predecessor(self) -> None:
        self.wait(lambda: not self._predecessor_runs)

    def check_may_store(self) -> None:
        if self._predecessor_runs:
            raise Hazard("stored over what the kernel before may still read")

    def load(self, desc: Any, at: list[int], barrier: Barrier, buffer: Buffer) -> None:
        if self._predecessor_runs and desc.name == "x":
            raise Hazard("rows are read while the kernel that writes them runs")
        buffer.write("bytes under way")

        def land() -> None:
            buffer.write((desc.name, *at))
            barrier.landed(desc.block_type.nbytes)

        self.finish_later(land)

    def store(self, desc: Any, at: list[int], buffer: Buffer) -> None:
        self.check_may_store()
        if not buffer.is_fenced:
            raise Hazard("the copy engine does not see what no fence came after")
        buffer.readers += 1
        unread = self._unread.setdefault(threading.get_ident(), [])
        unread.append(buffer)

        def read() -> None:
            buffer.readers -= 1
            unread.remove(buffer)
            assert isinstance(buffer.holds, Tile)
            self.stores.append(((desc.name, *at), buffer.holds))

        self.finish_later(read)

    def store_wait(self, most: int) -> None:
        unread = self._unread.setdefault(threading.get_ident(), [])
        self.wait(lambda: len(unread) <= most)

    def fence(self) -> None:
        for buffer in self.buffers:
            buffer.is_fenced = buffer.is_fenced or buffer.writer == threading.get_ident()

    def product(
        self, x: Buffer, w: Buffer, acc: Tile | Product, use_acc: bool = True, *, is_async: bool = False
    ) -> Any:  # fmt: skip
        """Reads its operands until it is waited for."""
        before = acc if isinstance(acc, Product) else Product([], acc.products, acc.columns)
        if not use_acc:
            before = Product([], (), before.columns)
        for buffer in (x, w):
            buffer.readers += 1
        product = Product([*before.operands, (x, w)], before.products, before.columns)
        return product if is_async else self.product_wait(0, [product])

    def product_wait(self, most: int, deps: list[Product]) -> Any:
        """The last `most` pairs of operands may still be read."""
        self.wait()
        found = [self._done(product, most) for product in deps]
        return found[0] if len(found) == 1 else tuple(found)

    def _done(self, product: Product, most: int) -> Tile | Product:
        num_done = max(0, len(product.operands) - most)
        products = product.products
        for x, w in product.operands[:num_done]:
            if not isinstance(x.holds, tuple) or not isinstance(w.holds, tuple):
                raise Hazard(f"a product of {x.holds} and {w.holds}")
            products += ((x.holds, w.holds),)
            x.readers -= 1
            w.readers -= 1
        return (
            Product(product.operands[num_done:], products, product.columns) if most else Tile(products, product.columns)
        )

    def allocate(self, dtype: object, shape: list[int], layout: object) -> Many:
        if dtype is int:
            return Many([Barrier() for _ in range(shape[0])])
        buffers = [Buffer() for _ in range(shape[0])]
        self.buffers += buffers
        return Many(buffers)


class _Turn:
    """A partition on a thread of its own, which runs between `go_on` and its next wait."""

    def __init__(self, partition: Callable[[], None]) -> None:
        self.has_ended = False
        self.is_ready: Callable[[], bool] = lambda: True
        self._partition = partition
        self._begin, self._gives_back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_stopped = False
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._begin.acquire()
        try:
            if not self._is_stopped:
                self._partition()
        except BaseException as error:  # noqa: BLE001  (raised again by `go_on`)
            self._error = error
        self.has_ended = True
        self._gives_back.release()

    def go_on(self) -> None:
        self._begin.release()
        self._gives_back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, is_ready: Callable[[], bool]) -> None:
        self.is_ready = is_ready
        self._gives_back.release()
        self._begin.acquire()
        if self._is_stopped:
            raise SystemExit

    def stop(self) -> None:
        self._is_stopped = True
        self._begin.release()
        self.thread.join(10)
