"""Kernels of latent attention as machine code, without a GPU: what fits a multiprocessor, and the instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import latent_launch
from cluster.engine.kernels.triton.plans import REFERENCE_LATENT, LatentPlan
from tests.unit.triton_compile import compiled_for_hopper, spilled_bytes

SHARED_BYTES = 232_448  # of an H100's multiprocessor, for one program
BF16 = torch.bfloat16


def compiled(num_heads: int, num_rows: int, directory: Path, plan: LatentPlan | None = None) -> list[Any]:
    """What a step of one sequence with a context of 1,025 starts, for DeepSeek's row of 512 + 64."""
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, num_rows], dtype=torch.int32),
        context_len=torch.tensor([1025], dtype=torch.int32),
        block_table=torch.zeros((1, 64), dtype=torch.int32),
        slot_mapping=torch.zeros(num_rows, dtype=torch.int64),
        positions=torch.zeros(num_rows, dtype=torch.int64),
        num_rows_max=num_rows,
        context_len_max=1025,
    )
    cache = torch.zeros((2, 2, 1, 1, 64, 576), dtype=BF16)[:, 1]
    q = torch.zeros((num_rows, num_heads, 512), dtype=BF16)
    with compiled_for_hopper(directory) as kernels:
        latent_launch.run_latent_attention(q, q[:, :, :64], cache, metadata, 0.1, plan or LatentPlan(), 132)
    return kernels


@pytest.mark.parametrize(
    ("num_heads", "num_rows", "names", "spills"),
    [
        (16, 1, ["list_splits_kernel", "latent_split_kernel", "fold_kernel"], 0),
        (128, 1, ["list_splits_kernel", "latent_split_kernel", "fold_kernel"], 512),
        (16, 300, ["list_tiles_kernel", *["latent_prefill_kernel"] * 2], 512),
    ],
    ids=["16 heads, one row", "128 heads, one row", "many rows"],
)
def test_tiles_fit_a_multiprocessor(
    num_heads: int, num_rows: int, names: list[str], spills: int, tmp_path: Path
) -> None:
    kernels = compiled(num_heads, num_rows, tmp_path)
    assert [kernel.name for kernel in kernels] == names
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_BYTES
        assert spilled_bytes(kernel) <= spills
        assert "atom" not in kernel.asm["ptx"]
        if num_heads == 128 or num_rows > 1:
            assert ("wgmma.mma_async" in kernel.asm["ptx"]) == kernel.name.startswith("latent")


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize(
    ("plan", "num_rows"),
    [(REFERENCE_LATENT, 1), (REFERENCE_LATENT, 300), (LatentPlan(split_num_stages=1), 1)],
    ids=["reference, one row", "reference, many rows", "one stage"],
)
def test_what_serves_instead_of_a_refused_plan_fits_too(
    plan: LatentPlan, num_rows: int, num_heads: int, tmp_path: Path
) -> None:
    """An error of the reference would end the start."""
    for kernel in compiled(num_heads, num_rows, tmp_path, plan):
        assert kernel.metadata.shared <= SHARED_BYTES
        assert spilled_bytes(kernel) <= 1024  # it need not be fast
