"""Attention whose partial results do not fit into the scratch memory together: the same bits, some at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster.engine.gpu.shapes import MANY_ROWS, StepShape
from cluster.engine.kernels.triton import attention_launch, latent_launch
from cluster.engine.kernels.triton.plans import LatentPlan
from tests.gpu.support import Paged
from tests.gpu.support_latent import PagedLatent
from tests.unit.triton_interpret_graph_cases import attend, shorten_splits


def parts_of(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each start of the split kernels is for, from here on."""
    parts: list[int] = []
    plain = module._run_split

    def noting(call: Any, *more: Any) -> None:
        parts.append(call.num_sequences)
        plain(call, *more)

    monkeypatch.setattr(module, "_run_split", noting)
    return parts


@pytest.mark.parametrize("rows", [[1] * 11, [1, 9, 1, 1, 17, 1, 1, 1, 1, 1, 1]])
def test_sequences_that_have_no_scratch_together_are_served_in_parts(
    rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many that share a long prefix have more splits than the pool's keys have."""
    shorten_splits(monkeypatch)
    contexts = [200, 64, 30, 65, 17, 130, 20, 129, 128, 1, 255]
    cache = Paged(contexts, num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    parts = parts_of(attention_launch, monkeypatch)
    shape = StepShape(48, 12, 0, MANY_ROWS, True, num_prompts_max=2)
    for graph in (None, shape):
        parts.clear()
        whole = attend(cache, rows, graph)
        assert parts == [11 if graph is None else 12]
        with monkeypatch.context() as patch:
            patch.setattr(attention_launch, "MOST_SCRATCH_BYTES", 4 * 25 * 4 * 17)  # of 4 sequences with 4 splits
            assert torch.equal(attend(cache, rows, graph), whole)
        assert parts[1:] == ([4, 4, 3] if graph is None else [4, 4, 4])


def test_latent_attention_is_served_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [530, 70, 1, 600, 513, 512]
    cache = PagedLatent(contexts, num_heads=4, latent_size=32, rope_size=16, dtype=torch.float16, device="cpu")
    everyone, single_rows = [*range(6)], [1] * 6
    whole = cache.attend(everyone, single_rows, plan=LatentPlan())
    parts = parts_of(latent_launch, monkeypatch)
    monkeypatch.setattr(attention_launch, "MOST_SCRATCH_BYTES", 1)
    served = cache.attend(everyone, single_rows, plan=LatentPlan())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(served, whole, strict=True))
    assert parts == [4, 2]
