"""Which FP8 plan serves which shape: bounds, neighbours, the library and what it does not take, block scales."""

from __future__ import annotations

import msgspec
import pytest

pytest.importorskip("triton")

from cluster.engine.kernels.triton import fp8_table
from cluster.engine.kernels.triton.fp8_plans import Fp8Plan, fitting, unmeasured_plan
from cluster.engine.kernels.triton.fp8_table import Fp8Entry, Fp8PlanIndex, Fp8Table, load_fp8_plans

LIBRARY = Fp8Plan(kind="library")
OWN = Fp8Plan(block_n=128)
RINGS = Fp8Plan(kind="rings", block_m=128, block_n=256, num_stages=9, x_stages=3, lead=8, store_parts=2)


def entry(n: int, k: int, rows: int, plan: Fp8Plan, otherwise: Fp8Plan | None = None, silu: bool = False) -> Fp8Entry:
    return Fp8Entry(out_features=n, in_features=k, max_rows=rows, silu_mul=silu, plan=plan, otherwise=otherwise)


def test_the_smallest_bound_that_holds_the_rows_serves_and_the_largest_all_above() -> None:
    plans = [Fp8Plan(block_n=32 * i) for i in (1, 2, 4)]
    index = Fp8PlanIndex(Fp8Table(device="x", linear=tuple(entry(64, 64, 4**i, plans[i]) for i in (2, 0, 1))))
    found = [index.linear(64, 64, rows, silu_mul=False) for rows in (1, 2, 4, 5, 16, 17, 10**6)]
    assert found == [plans[i] for i in (0, 1, 1, 2, 2, 2, 2)]


def test_the_library_serves_only_what_it_was_admitted_for() -> None:
    linear = (entry(4096, 4096, 16, OWN), entry(4096, 4096, 512, LIBRARY, RINGS), entry(100, 100, 16, LIBRARY))
    index = Fp8PlanIndex(Fp8Table(device="x", linear=linear))
    assert index.linear(4096, 4096, 100, silu_mul=False) == LIBRARY
    assert index.linear(4096, 4096, 100, silu_mul=False, takes_library=False) == RINGS
    assert index.linear(100, 100, 1, silu_mul=False, takes_library=False) == unmeasured_plan(16)
    assert index.linear(4000, 4096, 100, silu_mul=False) == RINGS  # another shape, another algorithm
    assert index.linear(4000, 4096, 1, silu_mul=False) == OWN
    assert index.linear(4096, 4096, 100, silu_mul=True) == unmeasured_plan(100)
    assert index.entries() == list(linear)


def test_a_table_measured_with_other_libraries_brings_our_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Fp8Table(device="x", versions={"torch": "1"}, linear=(entry(64, 64, 16, LIBRARY, RINGS),))

    class Package:
        def __truediv__(self, name: str) -> Package:
            return self

        def is_file(self) -> bool:
            return True

        def read_bytes(self) -> bytes:
            return msgspec.json.encode(table)

    monkeypatch.setattr("importlib.resources.files", lambda package: Package())
    for versions, expected in (({"torch": "1"}, LIBRARY), ({"torch": "2"}, RINGS)):
        monkeypatch.setattr(fp8_table, "library_versions", lambda versions=versions: versions)
        assert load_fp8_plans("x").linear(64, 64, 1, silu_mul=False) == expected


def test_a_device_without_a_table_runs_on_defaults() -> None:
    index = load_fp8_plans("Some GPU")
    assert index.linear(4096, 4096, 8, silu_mul=False).swap
    assert index.linear(4096, 4096, 10**5, silu_mul=False).kind == "chain"


def test_block_scales_take_narrower_tiles() -> None:
    assert fitting(RINGS, 0, silu_mul=False) == RINGS
    assert fitting(RINGS, 0, silu_mul=True) == msgspec.structs.replace(RINGS, block_n=128)
    assert fitting(RINGS, 128, silu_mul=False) == msgspec.structs.replace(RINGS, block_n=128)
    for scale_rows, silu_mul in ((128, True), (64, False)):
        assert fitting(RINGS, scale_rows, silu_mul=silu_mul).kind == "tma"
    assert fitting(OWN, 64, silu_mul=True) == OWN


def test_x_of_a_chain_fits_its_ring() -> None:
    assert fitting(RINGS, 0, silu_mul=False, chain=2) == RINGS
    found = fitting(RINGS, 0, silu_mul=False, chain=4)
    assert (found.kind, found.block_n, found.x_stages) == ("rings", 256, 4)
    assert found.lead < found.num_stages
    assert fitting(RINGS, 0, silu_mul=True, chain=4).block_n == 128
    assert fitting(OWN, 0, silu_mul=True, chain=4) == OWN
