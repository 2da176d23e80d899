"""The attention kernels' lists of work: made once for a step, never taken from another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention
from cluster.engine.kernels.triton.attention_launch import WorkLists


def metadata_of(context: int) -> AttentionMetadata:
    return AttentionMetadata(
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        context_len=torch.tensor([context], dtype=torch.int32),
        block_table=torch.zeros((1, 32), dtype=torch.int32),
        slot_mapping=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        num_rows_max=1,
        context_len_max=context,
    )


class FakeKernel:
    """Writes the step's context into the list; `while_running` stands for another thread."""

    def __init__(self) -> None:
        self.num_started = 0
        self.while_running: Any = None

    def __getitem__(self, grid: object) -> Any:
        def run(
            records: torch.Tensor,
            firsts: torch.Tensor,
            starts: object,
            contexts: torch.Tensor,
            *more: Any,
            **constants: Any,
        ) -> None:
            self.num_started += 1
            records.fill_(int(contexts[0]))
            other, self.while_running = self.while_running, None
            if other is not None:
                other()

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(attention, "list_splits_kernel", fake)
    return fake


def test_layers_of_a_step_share_a_list_and_another_window_has_its_own(kernel: FakeKernel) -> None:
    lists, metadata = WorkLists(), metadata_of(600)
    first = lists.splits(metadata, 2, 1, None)
    assert lists.splits(metadata, 2, 1, None)[0] is first[0]
    assert kernel.num_started == 1
    lists.splits(metadata, 2, 1, 40)
    assert kernel.num_started == 2


def test_the_next_step_has_a_new_list_even_if_its_lengths_are_equal(kernel: FakeKernel) -> None:
    lists, metadata = WorkLists(), metadata_of(600)
    first = lists.splits(metadata, 2, 1, None)[0]
    assert lists.splits(replace(metadata), 2, 1, None)[0] is not first


def test_a_step_that_comes_in_between_changes_no_list(kernel: FakeKernel) -> None:
    """Two threads with one set of operations: the other step's list is made while this one's is."""
    lists, mine, other = WorkLists(), metadata_of(520), metadata_of(600)
    kernel.while_running = lambda: lists.splits(other, 2, 1, None)
    assert int(lists.splits(mine, 2, 1, None)[0][0, 0]) == 520
    assert int(lists.splits(other, 2, 1, None)[0][0, 0]) == 600
    assert int(lists.splits(mine, 2, 1, None)[0][0, 0]) == 520
