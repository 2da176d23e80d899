"""Attention: one value per (row, head), whichever path, chunk, tile, batch or block size computed it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.triton import attention, attention_launch
from cluster.engine.kernels.triton.attention_trials import AttentionCase, RopeAttentionTrial
from cluster.engine.kernels.triton.plans import AttentionPlan
from tests.gpu.support import NUM_MULTIPROCESSORS, Paged, bits_equal, in_graph, mutated, num_differing, relative_error

CONTEXT = 2500
HEADS = [(8, 2, 128), (8, 8, 64), (10, 2, 128), (4, 1, 256), (6, 2, 96), (9, 3, 64)]
PREFILL_PLANS = [
    AttentionPlan(prefill_block_rows=rows, prefill_num_warps=warps, prefill_num_stages=stages, prefill_use_tma=tma)
    for rows, warps, stages, tma in (
        (16, 4, 2, False),
        (32, 4, 3, False),
        (64, 4, 3, False),
        (64, 4, 3, True),
        (64, 8, 2, False),
        (128, 8, 3, False),
        (128, 8, 5, True),
    )
] + [AttentionPlan(prefill_kind="hopper", prefill_num_stages=stages) for stages in (2, 3, 4)]


def paged(
    num_heads: int, num_kv_heads: int, head_size: int, contexts: list[int] | None = None, block: int = 64
) -> Paged:
    return Paged(
        contexts or [CONTEXT], num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, block_size=block
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), HEADS)
def test_prefill_is_right_in_float64(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    cache = paged(num_heads, num_kv_heads, head_size)
    assert relative_error(cache.attend([0], [CONTEXT])[0], cache.expected(0)) < 6e-3


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), HEADS)
def test_prefill_chunks_and_decode_have_the_same_bits(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    cache = paged(num_heads, num_kv_heads, head_size)
    whole = cache.attend([0], [CONTEXT])[0]
    for size in (97, 512, 1000):
        ends = [*range(size, CONTEXT, size), CONTEXT]
        rows = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        chunks = [cache.attend([0], [count], [end])[0] for count, end in zip(rows, ends, strict=True)]
        assert num_differing(torch.cat(chunks), whole) == 0, size
    for context in (1, 63, 64, 65, 511, 512, 513, 1024, 1025, 2048, 2499, 2500):
        assert num_differing(cache.attend([0], [1], [context])[0], whole[context - 1 : context]) == 0, context


@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_every_tile_has_the_same_bits(head_size: int) -> None:
    cache = paged(8, 2, head_size)
    expected = cache.attend([0], [CONTEXT], plan=PREFILL_PLANS[0])[0]
    differing = {}
    for plan in PREFILL_PLANS[1:]:
        if head_size == 256 and plan.prefill_num_stages > 3:
            continue
        differing[plan] = num_differing(cache.attend([0], [CONTEXT], plan=plan)[0], expected)
    assert not any(differing.values()), differing


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"), [(8, 8, 64), (10, 2, 128), (9, 3, 64), (32, 2, 128)]
)
@pytest.mark.parametrize("block", [64, 128])
def test_warp_group_kernel_equals_the_tiled_one(num_heads: int, num_kv_heads: int, head_size: int, block: int) -> None:
    contexts = [1, 64, 700, 1537, 33, 2500, 512, 1025]
    cache = paged(num_heads, num_kv_heads, head_size, contexts, block=block)
    hopper = AttentionPlan(prefill_kind="hopper", prefill_num_stages=3)
    for rows in (contexts, [1, 64, 1, 200, 1, 1, 3, 1000], [1, 33, 97, 65, 2, 1, 511, 513]):
        tiled = cache.attend(list(range(8)), rows)
        for index, result in enumerate(cache.attend(list(range(8)), rows, plan=hopper)):
            assert num_differing(result, tiled[index]) == 0, (rows, index)


@pytest.mark.parametrize("warps", [2, 4, 8])
@pytest.mark.parametrize("stages", [2, 5])
def test_every_split_launch_has_the_same_bits(warps: int, stages: int) -> None:
    cache = paged(8, 2, 128)
    expected = cache.attend([0], [1])[0]
    for programs in (1, 3):
        plan = AttentionPlan(split_num_warps=warps, split_num_stages=stages, split_programs_per_multiprocessor=programs)
        assert bits_equal(cache.attend([0], [1], plan=plan)[0], expected)
    for rows in (1, 2, 4, 7, 16):  # a few rows of one sequence, as speculation asks for
        plan = AttentionPlan(split_num_warps=warps, split_num_stages=stages, split_block_rows=64)
        assert bits_equal(cache.attend([0], [rows], plan=plan)[0], cache.attend([0], [CONTEXT])[0][-rows:]), rows


def test_block_size_does_not_matter() -> None:
    results = []
    for block in (16, 32, 64, 128):
        cache = paged(8, 2, 128, block=block)
        canonical = torch.randn((CONTEXT, 2, 2, 128), generator=torch.Generator().manual_seed(9)).bfloat16().cuda()
        slots = (
            cache.table[0, torch.arange(CONTEXT) // block].long() * block + torch.arange(CONTEXT, device="cuda") % block
        )
        for part in (0, 1):
            cache.layer[slots // block, part, :, slots % block] = canonical[:, part]
        cache.q[0] = torch.randn((CONTEXT, 8, 128), generator=torch.Generator().manual_seed(8)).bfloat16().cuda()
        results.append((cache.attend([0], [CONTEXT])[0], cache.attend([0], [1])[0]))
    for whole, last in results[1:]:
        assert bits_equal(whole, results[0][0])
        assert bits_equal(last, results[0][1])


def test_neighbours_do_not_matter() -> None:
    contexts = [1, 64, 700, 1537, 33, 2500, 512, 1025]
    cache = paged(8, 2, 128, contexts)
    alone = [cache.attend([i], [c])[0] for i, c in enumerate(contexts)]
    for rows in (contexts, [1] * 8, [1, 64, 1, 200, 1, 1, 3, 1000], [1, 5, 4, 1, 2, 1, 1, 1]):
        together = cache.attend(list(range(8)), rows)
        for index, count in enumerate(rows):
            assert bits_equal(together[index], alone[index][-count:]), (rows, index)
    reverse = cache.attend(list(range(7, -1, -1)), [1] * 8)
    assert all(bits_equal(reverse[7 - index], alone[index][-1:]) for index in range(8))


def test_graph_with_a_longer_bound_and_padding_equals_eager() -> None:
    """A captured decode step reads its lengths on the device: smaller batches and contexts than its bounds."""
    cache = paged(8, 2, 128, [300, 2500, 700])
    eager = cache.attend([0, 1, 2], [1, 1, 1])
    metadata = cache.metadata([0, 1, 2], [1, 1, 1], [300, 2500, 700])
    starts = torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([300, 2500, 700, 0, 0], dtype=torch.int32, device="cuda")
    table = torch.nn.functional.pad(metadata.block_table, (0, 25, 0, 2))
    padded = type(metadata)(starts, lengths, table, metadata.slot_mapping, metadata.positions, 1, 4096)
    q = torch.cat([cache.q[i][-1:] for i in range(3)] + [cache.q[0][:2]])
    out = in_graph(
        lambda: attention_launch.run_attention(
            q, cache.layer, padded, cache.scale, AttentionPlan(), NUM_MULTIPROCESSORS, torch.float32
        )
    )
    assert bits_equal(out[:3], torch.cat(eager))


WINDOWS = [1, 64, 100, 600]
WINDOWED_HEADS = [(8, 2, 128), (9, 3, 64)]
WINDOWED_PLANS = [PREFILL_PLANS[index] for index in (0, 3, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), WINDOWED_HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_window_is_right_in_float64(num_heads: int, num_kv_heads: int, head_size: int, window: int) -> None:
    cache = paged(num_heads, num_kv_heads, head_size)
    expected = cache.expected(0, window)
    assert relative_error(cache.attend([0], [CONTEXT], window=window)[0], expected) < 6e-3
    assert relative_error(cache.attend([0], [1], window=window)[0], expected[-1:]) < 6e-3


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), WINDOWED_HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_window_prefill_chunks_and_decode_have_the_same_bits(
    num_heads: int, num_kv_heads: int, head_size: int, window: int
) -> None:
    cache = paged(num_heads, num_kv_heads, head_size)
    whole = cache.attend([0], [CONTEXT], window=window)[0]
    for size in (97, 512):
        ends = [*range(size, CONTEXT, size), CONTEXT]
        rows = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        chunks = [cache.attend([0], [count], [end], window=window)[0] for count, end in zip(rows, ends, strict=True)]
        assert num_differing(torch.cat(chunks), whole) == 0, size
    edges = {edge + window + step for edge in (0, 64, 512, 1024) for step in (-1, 0, 1)}
    for context in sorted({1, 64, 65, 512, 513, 1025, 2500} | edges - {0}):
        row = cache.attend([0], [1], [context], window=window)[0]
        assert num_differing(row, whole[context - 1 : context]) == 0, context
    for last in (7, 16):
        assert num_differing(cache.attend([0], [last], window=window)[0], whole[-last:]) == 0, last


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("window", [40, 700])
def test_every_tile_has_the_same_bits_in_a_window(head_size: int, window: int) -> None:
    """Tiles differ in how many masked blocks they visit."""
    cache = paged(8, 2, head_size)
    expected = cache.attend([0], [CONTEXT], plan=WINDOWED_PLANS[0], window=window)[0]
    differing = {
        plan: num_differing(cache.attend([0], [CONTEXT], plan=plan, window=window)[0], expected)
        for plan in WINDOWED_PLANS[1:]
    }
    assert not any(differing.values()), differing


def test_a_window_that_holds_everything_is_full_attention() -> None:
    cache = paged(8, 2, 128)
    for rows in (1, 16, CONTEXT):
        assert bits_equal(cache.attend([0], [rows], window=CONTEXT)[0], cache.attend([0], [rows])[0]), rows


def test_neighbours_do_not_matter_in_a_window() -> None:
    contexts = [1, 64, 700, 1537, 33, 2500, 512, 1025]
    cache = paged(8, 2, 128, contexts)
    for window in (50, 600):
        alone = [cache.attend([i], [c], window=window)[0] for i, c in enumerate(contexts)]
        for rows in (contexts, [1] * 8, [1, 64, 1, 200, 1, 1, 3, 1000], [1, 5, 4, 1, 2, 1, 1, 1]):
            for plan in (AttentionPlan(), AttentionPlan(prefill_kind="hopper")):
                together = cache.attend(list(range(8)), rows, plan=plan, window=window)
                for index, count in enumerate(rows):
                    assert bits_equal(together[index], alone[index][-count:]), (window, rows, index)


def test_window_work_is_bounded_and_captured() -> None:
    """A graph of a decode step with longer bounds; table entries of blocks before the windows are wild."""
    contexts = [300, 2500, 700]
    cache = paged(8, 2, 128, contexts)
    eager = cache.attend([0, 1, 2], [1, 1, 1], window=90)
    metadata = cache.metadata([0, 1, 2], [1, 1, 1], contexts)
    for index, context in enumerate(contexts):
        metadata.block_table[index, : (context - 90) // 64] = 2**30
    padded = type(metadata)(
        metadata.query_start, metadata.context_len, metadata.block_table, metadata.slot_mapping, metadata.positions, 1,
        8192,
    )  # fmt: skip
    q = torch.cat([cache.q[i][-1:] for i in range(3)])
    out = in_graph(
        lambda: attention_launch.run_attention(
            q, cache.layer, padded, cache.scale, AttentionPlan(), NUM_MULTIPROCESSORS, torch.float32, window=90
        )
    )
    assert bits_equal(out, torch.cat(eager))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("> q_pos[:, None] - window", ">= q_pos[:, None] - window"),
        ("position - window + 1, 0)", "position - window + 65, 0)"),
        ("(before + split) * NUM", "(before + num_splits - 1 - split) * NUM"),
    ],
)
def test_planted_wrong_windows_are_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged(8, 2, 128)
    whole = cache.attend([0], [CONTEXT], window=1500)[0]
    monkeypatch.setattr(attention_launch, "attention", mutated(attention, old, new, tmp_path))
    assert num_differing(cache.attend([0], [1], window=1500)[0], whole[-1:]) > 0


def test_planted_reversed_fold_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged(8, 2, 128)
    whole = cache.attend([0], [CONTEXT])[0]
    broken = mutated(attention, "(before + split) * NUM", "(before + num_splits - 1 - split) * NUM", tmp_path)
    monkeypatch.setattr(attention_launch, "attention", broken)
    assert num_differing(cache.attend([0], [1])[0], whole[-1:]) > 0


def test_planted_tile_wide_rescale_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged(8, 2, 128)
    old = "top = tl.maximum(m, tl.max(s, axis=1) * scale_log2)"
    new = "top = tl.maximum(m, tl.max(tl.max(s, axis=1), axis=0) * scale_log2)"
    monkeypatch.setattr(attention_launch, "attention", mutated(attention, old, new, tmp_path))
    whole = cache.attend([0], [CONTEXT])[0]
    assert num_differing(cache.attend([0], [97], [1000])[0], whole[903:1000]) > 0


def test_planted_moving_splits_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits counted from the end of the context instead of position 0."""
    cache = paged(8, 2, 128)
    whole = cache.attend([0], [CONTEXT])[0]
    old = "first_key = split * SPLIT_KEYS"
    new = "first_key = tl.maximum(split * SPLIT_KEYS - (SPLIT_KEYS - context % SPLIT_KEYS) // 64 * 64, 0)"
    broken = mutated(attention, old, new, tmp_path)
    stop = "tl.minimum(first_key + SPLIT_KEYS, context)"
    moved = "tl.minimum((split + 1) * SPLIT_KEYS - (SPLIT_KEYS - context % SPLIT_KEYS) // 64 * 64, context)"
    monkeypatch.setattr(attention_launch, "attention", mutated(broken, stop, moved, tmp_path))
    out = cache.attend([0], [1], [2200])[0]
    assert relative_error(out, whole[2199:2200]) < 1e-2
    assert num_differing(out, whole[2199:2200]) > 0


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), HEADS)
@pytest.mark.parametrize("window", [None, 600])
def test_single_rows_are_rotated_and_stored_by_the_split_kernel(
    num_heads: int, num_kv_heads: int, head_size: int, window: int | None
) -> None:
    """Beside the rotary kernel: results and cache, eager and in a graph, however many warps, stages and programs."""
    ops = CudaOps(torch.device("cuda"))
    for warps, stages, multiprocessors in ((4, 5, NUM_MULTIPROCESSORS), (4, 5, 1), (2, 3, NUM_MULTIPROCESSORS)):
        plan = AttentionPlan(
            split_rope_up_to=64, split_num_warps=warps, split_num_stages=stages, split_programs_per_multiprocessor=2
        )
        for dtype in (torch.float32, torch.bfloat16):
            case = AttentionCase(num_heads, (num_kv_heads, 64, head_size), torch.bfloat16, window, 1, 40, ops.device)
            trial = RopeAttentionTrial(lambda *_: pytest.fail("it is not run"), plan, case, dtype)
            inputs = trial.draw(3, plan)
            expected_kv, kv = inputs.kv_N2GSD.clone(), inputs.kv_N2GSD.clone()
            q = ops.rope_and_cache(inputs.qkv_TC, expected_kv, inputs.unpadded, *inputs.rotation)
            expected = ops.attention(q, expected_kv, inputs.unpadded, 0.1, window=window)
            rotate_and_attend = partial(
                attention_launch.run_rope_attention, inputs.qkv_TC, kv, inputs.metadata, inputs.rotation, 0.1, plan,
                multiprocessors, window=window, pdl=1,
            )  # fmt: skip
            assert attention_launch.can_take_rope(plan, inputs.metadata, inputs.rotation)
            assert bits_equal(rotate_and_attend(), expected)
            assert bits_equal(kv.nan_to_num(7.0), expected_kv.nan_to_num(7.0))
            kv.copy_(inputs.kv_N2GSD)
            assert bits_equal(in_graph(rotate_and_attend), expected)
            assert bits_equal(kv.nan_to_num(7.0), expected_kv.nan_to_num(7.0))
    assert ops.admission.refusals == []


@pytest.mark.parametrize("window", [None, 700])
def test_parts_for_want_of_scratch_have_the_same_bits(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [2500, 1, 700, 513, 1537, 64, 2048, 1025, 90, 1999, 512]
    cache = paged(8, 2, 128, contexts)
    rows = [1] * len(contexts)
    whole = cache.attend([*range(len(contexts))], rows, window=window)
    monkeypatch.setattr(attention_launch, "MOST_SCRATCH_BYTES", 1)
    parts = cache.attend([*range(len(contexts))], rows, window=window)
    assert sum(num_differing(ours, theirs) for ours, theirs in zip(parts, whole, strict=True)) == 0
