"""The baseline that computes as torch does by default: its attention reads the right keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.torch_defaults import fresh_attention, fresh_lengths
from tests.gpu.support import Paged, relative_error


@pytest.mark.parametrize("contexts", [[70, 70, 70], [5, 130, 130, 64, 1], [33]])
@pytest.mark.parametrize("num_padding_rows", [0, 7])
def test_fresh_prompts_attend_to_their_own_keys(contexts: list[int], num_padding_rows: int) -> None:
    """Slots that hold no key are NaN."""
    cache = Paged(contexts, block_size=32, dtype=torch.float32, device="cpu")
    q = torch.cat([*cache.q, torch.zeros((num_padding_rows, *cache.q[0].shape[1:]))])
    found = fresh_attention(q, cache.layer, cache.table, tuple(contexts), cache.scale)
    assert found.shape == (sum(contexts) + num_padding_rows, cache.q[0][0].numel())
    start = 0
    for sequence, context in enumerate(contexts):
        assert relative_error(found[start : start + context], cache.expected(sequence)) < 1e-5, sequence
        start += context


def batch(*entries: tuple[int, int]) -> Any:
    scheduled = [SimpleNamespace(start=start, num_tokens=count) for start, count in entries]
    return SimpleNamespace(age=0, scheduled=scheduled)


def test_a_step_that_reads_earlier_keys_is_not_fresh() -> None:
    assert fresh_lengths(cast(Any, batch((0, 2048), (0, 100)))) == (2048, 100)
    assert fresh_lengths(cast(Any, batch((0, 2048), (2048, 1)))) is None
