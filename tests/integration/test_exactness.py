"""The product's promise on real processes: one process, 1P+1D and 2P+2D give the same bits.

A small part of `python -m benchmarks.exactness`, whose whole matrix takes some minutes.
"""

from __future__ import annotations

import pytest

from benchmarks.exactness import BROKEN, QUICK, run_matrix

pytestmark = pytest.mark.timeout(900)


def test_tokens_logprobs_and_kv_are_equal_in_every_topology_and_nothing_stays_held() -> None:
    results = run_matrix("demo", QUICK)
    assert len(results.cells) == 6
    assert [cell for cell in results.cells if cell.differences] == []
    assert all(kv.num_compared > 0 for kv in results.kv)
    assert [kv for kv in results.kv if kv.num_different] == []


@pytest.mark.parametrize("mutation", ["linear", "attention"])
def test_a_kernel_with_another_order_is_noticed(mutation: str) -> None:
    results = run_matrix("demo", BROKEN, {"TANDEM_BREAK_KERNEL": mutation})
    assert any(cell.differences for cell in results.cells), f"the broken {mutation} went unnoticed"
