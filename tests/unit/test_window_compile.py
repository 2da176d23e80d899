"""The attention kernels compile for an H100 with a window and without one, which then costs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cluster.engine.kernels.ops import Rotation
from cluster.engine.kernels.triton import attention_launch
from cluster.engine.kernels.triton.plans import AttentionPlan
from tests.gpu.support import NUM_MULTIPROCESSORS, Paged
from tests.unit.triton_compile import compiled_for_hopper, innermost_loops, spilled_bytes

CONTEXTS = [700, 600, 1]
TILED = AttentionPlan(prefill_use_tma=True)


def _compiled(directory: Path, window: int | None, plan: AttentionPlan = TILED) -> dict[str, Any]:
    """Decode and prefill of one batch: every kernel by its name."""
    cache = Paged(CONTEXTS, num_heads=8, num_kv_heads=2, head_size=64, device="cpu")
    metadata = cache.metadata([0, 1, 2], [700, 2, 1], CONTEXTS)
    q = torch.cat([cache.q[0], cache.q[1][:2], cache.q[2]])
    with compiled_for_hopper(directory) as kernels:
        attention_launch.run_attention(q, cache.layer, metadata, cache.scale, plan, NUM_MULTIPROCESSORS, window=window)
    return {kernel.metadata.name: kernel for kernel in kernels}


def test_a_window_is_compiled_in_only_where_there_is_one(tmp_path: Path) -> None:
    full, windowed = _compiled(tmp_path, None), _compiled(tmp_path, 40)
    assert set(full) == set(windowed) == {"list_splits_kernel", "split_kernel", "fold_kernel", "prefill_kernel"}
    for name, kernel in full.items():
        parameters = [
            len(re.findall(r"^\s*\.param \.", compiled.asm["ptx"], re.MULTILINE))
            for compiled in (kernel, windowed[name])
        ]
        assert parameters[1] == parameters[0] + 1, name


def test_another_window_needs_no_other_kernel(tmp_path: Path) -> None:
    first, second = (_compiled(tmp_path, window) for window in (40, 512))
    assert {kernel.hash for kernel in first.values()} == {kernel.hash for kernel in second.values()}


def test_a_row_s_own_key_is_stored_before_any_block_is_asked_for(tmp_path: Path) -> None:
    """By the split kernel that rotates: other threads of the program read it."""
    plan = AttentionPlan(split_rope_up_to=64, split_num_stages=5)
    cache = Paged(CONTEXTS, num_heads=8, num_kv_heads=2, head_size=128, device="cpu")
    metadata = cache.metadata([0, 1, 2], [1, 1, 1], CONTEXTS)
    rotation = Rotation(torch.zeros(max(CONTEXTS), 128), 8)
    with compiled_for_hopper(tmp_path) as kernels:
        attention_launch.run_rope_attention(
            torch.zeros(3, 12 * 128), cache.layer, metadata, rotation, cache.scale, plan, NUM_MULTIPROCESSORS
        )  # fmt: skip
    (kernel,) = [kernel for kernel in kernels if kernel.metadata.name == "split_kernel"]
    ptx = kernel.asm["ptx"]
    stored, loads = ptx.rindex("st.global.b16", 0, ptx.index("cp.async.cg")), ptx.index("cp.async.cg")
    assert "bar.sync" in ptx[stored:loads]
    assert ptx[:loads].count("st.global.b16") == 2  # K and V
    assert spilled_bytes(kernel) == 0


@pytest.mark.parametrize("window", [None, 40])
def test_a_softmax_is_computed_while_products_run(window: int | None, tmp_path: Path) -> None:
    """The assembler would put it after the wait for them."""
    kernel = _compiled(tmp_path, window, AttentionPlan(prefill_kind="hopper"))["prefill_hopper_kernel"]
    loops = [loop for loop in innermost_loops(kernel) if "HGMMA" in loop]
    assert len(loops) == 2  # of the two consumers
    for loop in loops:
        lines = loop.splitlines()
        *_, last_product = (index for index, line in enumerate(lines) if "HGMMA" in line)
        *_, last_wait = (index for index, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line)
        num_exponentials = sum("MUFU.EX2" in line for line in lines[last_product:last_wait])
        assert num_exponentials >= 24  # of 32 scores a thread


def test_a_longer_list_of_tiles_needs_no_other_kernel(tmp_path: Path) -> None:
    plan = AttentionPlan(prefill_kind="hopper")
    found = _compiled(tmp_path, None, plan)
    assert "list_tiles_kernel" in found
    assert spilled_bytes(found["prefill_hopper_kernel"]) == 0
