"""The Triton kernels on the CPU, in Triton's interpreter: indexing, masks and formulas, not bits or speed.

The interpreter multiplies tiles with numpy, which is right for fp16 and fp32 operands and not for bf16.
Bits are proved on a GPU (tests/gpu). Started by `test_triton_interpret.py` in a process of its own:
Triton decides at its first import whether it interprets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.engine.kernels.ops import AttentionMetadata, Rotation
from cluster.engine.kernels.triton import attention, attention_launch, launch
from cluster.engine.kernels.triton.attention_trials import AttentionCase, RopeAttentionTrial
from cluster.engine.kernels.triton.plans import REFERENCE_ATTENTION, SPLIT_KEYS, AttentionPlan, LinearPlan
from cluster.engine.kv_cache import KVLayout
from kvconnector import digest
from kvconnector.digest import KVDigester, Span
from kvconnector.digest_kernel import start_digests
from tests.gpu.support import Paged, mutated, relative_error

LINEAR_PLANS = [
    LinearPlan(block_m=16, block_n=32, block_k=64),
    LinearPlan(block_m=16, block_n=32, block_k=32, swap=True),
    LinearPlan(kind="tma", block_m=16, block_n=32, block_k=32),
    LinearPlan(kind="tma", block_m=16, block_n=32, block_k=32, swap=True, persistent=False, store_parts=2),
]


@pytest.mark.parametrize("plan", LINEAR_PLANS)
@pytest.mark.parametrize("num_rows", [1, 21])
def test_linear(plan: LinearPlan, num_rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(num_rows, 72).half(), torch.randn(40, 72).half()
    bias = torch.randn(40).half()
    out = torch.full((num_rows, 40), torch.nan)
    launch.run_linear(x, w, bias, out, plan, num_programs=2)
    product = x.double() @ w.double().t()
    assert relative_error(out, product + bias.double()) < 1e-5
    gated = torch.full((num_rows, 20), torch.nan)
    launch.run_linear(x, w, None, gated, plan, silu_mul=True, num_programs=2)
    gate, up = product.chunk(2, dim=1)
    assert relative_error(gated, gate / (1 + torch.exp(-gate)) * up) < 1e-5


@pytest.mark.parametrize(
    "plan", [LINEAR_PLANS[2], LinearPlan(kind="stream", swap=True), LinearPlan(kind="hopper", block_m=128)]
)
def test_a_plan_for_the_copy_engine_falls_back_where_rows_are_not_aligned(plan: LinearPlan) -> None:
    x, w = torch.randn(3, 33).half(), torch.randn(5, 33).half()
    out = torch.full((3, 5), torch.nan)
    launch.run_linear(x, w, None, out, plan)
    assert relative_error(out, x.double() @ w.double().t()) < 1e-5


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "block_size"), [(4, 2, 16, 64), (6, 2, 24, 16), (3, 1, 32, 128)]
)
def test_attention(num_heads: int, num_kv_heads: int, head_size: int, block_size: int) -> None:
    """Mixed batches over a cache whose unused slots hold NaN and whose table has wild entries past the end."""
    contexts = [530, 70, 1]
    cache = Paged(
        contexts, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, block_size=block_size,
        dtype=torch.float16, device="cpu",
    )  # fmt: skip
    expected = [cache.expected(index) for index in range(3)]
    for rows, use_tma in (([3, 1, 1], False), ([20, 33, 1], False), ([20, 33, 1], True)):
        plan = AttentionPlan(prefill_block_rows=32, prefill_use_tma=use_tma)
        for index, out in enumerate(cache.attend([0, 1, 2], rows, plan=plan)):
            assert relative_error(out, expected[index][-rows[index] :]) < 2e-3, (rows, index)


def test_attention_of_a_prefix_does_not_see_what_follows() -> None:
    cache = Paged([530], num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device="cpu")
    expected = cache.expected(0)
    for context in (1, 65, 513):
        assert relative_error(cache.attend([0], [1], [context])[0], expected[context - 1 : context]) < 2e-3


@pytest.mark.parametrize("window", [1, 40, 64, 515])
def test_attention_within_a_window(window: int) -> None:
    """Decode, a few rows, prefill; windows that begin in a split, at its edge, and hold more than one."""
    contexts = [580, 70, 1]
    cache = Paged(contexts, num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    expected = [cache.expected(index, window) for index in range(3)]
    for rows, use_tma in (([1, 1, 1], False), ([3, 1, 1], False), ([90, 33, 1], False), ([90, 33, 1], True)):
        plan = AttentionPlan(prefill_block_rows=32, prefill_use_tma=use_tma)
        for index, out in enumerate(cache.attend([0, 1, 2], rows, plan=plan, window=window)):
            assert relative_error(out, expected[index][-rows[index] :]) < 2e-3, (rows, index)


@pytest.mark.parametrize("window", [40, 515])
def test_masked_blocks_have_the_bits_of_skipped_ones(window: int) -> None:
    """A tile of many rows visits blocks that some of its rows do not see; a single row's program skips them."""
    cache = Paged([640], num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device="cpu")
    single = [cache.attend([0], [1], [context], window=window)[0] for context in range(560, 641, 5)]
    for block_rows in (16, 256):
        plan = AttentionPlan(prefill_block_rows=block_rows, split_block_rows=16)
        rows = cache.attend([0], [100], plan=plan, window=window)[0]
        assert torch.equal(rows[19::5], torch.cat(single)), block_rows


def test_work_and_scratch_are_bounded_by_the_window() -> None:
    """Entries of blocks before the window may be wild: nobody looks at them."""
    cache = Paged([1200], num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device="cpu")
    for rows in (1, 3, 70):
        expected = cache.attend([0], [rows], window=30)[0]
        kept = cache.table[0, : (1200 - rows - 29) // 64].clone()
        cache.table[0, : len(kept)] = 1 << 30
        assert torch.equal(cache.attend([0], [rows], window=30)[0], expected), rows
        cache.table[0, : len(kept)] = kept


def test_tiles_are_listed_with_their_number_and_a_counter() -> None:
    """The last tile of a sequence, which sees most keys, comes first; a longer list has records without rows."""
    cache = Paged([300, 90, 1, 513], num_heads=2, num_kv_heads=1, head_size=16, device="cpu")
    metadata = cache.metadata([3, 0, 2, 1], [400, 150, 1, 90], [513, 300, 1, 90])
    found = attention_launch.WorkLists().tiles(metadata, 25, 32, 1).tolist()
    starts = metadata.query_start.tolist()
    wanted = [
        [sequence, first_row, starts[sequence], rows, context]
        for sequence, rows, context in ((0, 400, 513), (1, 150, 300), (3, 90, 90))
        for first_row in range(0, rows, 32)
    ]
    assert [record[:5] for record in found if record[3] > 0] == wanted[::-1]
    assert found[0][5:7] == [len(wanted), 0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("> q_pos[:, None] - window", ">= q_pos[:, None] - window"),
        ("position - window + 1, 0)", "position - window + 65, 0)"),
        ("cdiv(last_window, BLOCK_KV) * BLOCK_KV", "cdiv(0 * last_window, BLOCK_KV) * BLOCK_KV"),
    ],
)
def test_planted_wrong_windows_are_found(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Paged([200], num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device="cpu")
    monkeypatch.setattr(attention_launch, "attention", mutated(attention, old, new, tmp_path))
    rows = cache.attend([0], [200], window=70)[0]
    assert not relative_error(rows, cache.expected(0, 70)) < 2e-3


def rope_results(
    shape: tuple[int, int, int, int], window: int | None, num_sequences: int, qkv_dtype: torch.dtype
) -> list[list[torch.Tensor]]:
    """Results and caches of single rows: rotated by the split kernel, whose programs have several items each; in two
    steps, with the tiled kernel. One row is not to be stored: its key is there."""
    num_heads, num_kv_heads, block_size, head_size = shape

    def run(
        qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata, rotation: Rotation, plan: AttentionPlan
    ) -> torch.Tensor:
        return attention_launch.run_rope_attention(qkv, kv, metadata, rotation, 0.2, plan, 3, window=window)

    plan = AttentionPlan(split_rope_up_to=64)
    cache_shape = (num_kv_heads, block_size, head_size)
    case = AttentionCase(num_heads, cache_shape, torch.float16, window, 1, num_sequences, torch.device("cpu"))
    inputs = RopeAttentionTrial(run, plan, case, qkv_dtype).draw(1, plan)
    assert attention_launch.can_take_rope(plan, inputs.metadata, inputs.rotation)
    slots = inputs.metadata.slot_mapping  # of `unpadded`, too
    inputs.kv_N2GSD[slots[1] // block_size, :, :, slots[1] % block_size] = 0.5
    slots[1] = -1
    results = []
    for metadata, each in ((inputs.metadata, plan), (inputs.unpadded, REFERENCE_ATTENTION)):
        kv = torch.cat((torch.full_like(inputs.kv_N2GSD[:1], 7.0), inputs.kv_N2GSD))  # what a wrong slot may hit, too
        results.append([run(inputs.qkv_TC, kv[1:], metadata, inputs.rotation, each), kv])
    return results


@pytest.mark.parametrize(
    ("shape", "window", "num_sequences"),
    [((4, 2, 64, 16), None, 8), ((6, 2, 16, 24), None, 10), ((3, 1, 128, 32), 40, 8), ((4, 2, 64, 16), 700, 8)],
)
def test_the_split_kernel_rotates_and_stores_as_the_rotary_kernel_does(
    shape: tuple[int, int, int, int], window: int | None, num_sequences: int
) -> None:
    """Rows whose own key is the first or the last of a block, of a split, of several; some sequences are padding."""
    for dtype in (torch.float32, torch.float16):
        found, expected = rope_results(shape, window, num_sequences, dtype)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
        assert not torch.isnan(found[0]).any()  # so each row's own key was there in time


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("-crossed, crossed", "crossed, -crossed"),
        ("if (context - 1) // SPLIT_KEYS == split:", "if split == 0:"),
        ("head_ptr + place +", "head_ptr + place + D +"),
        ("(slot >= 0).to(tl.int32) > 0", "(slot >= -1).to(tl.int32) > 0"),
        ("tl.store(target + stride_kv, v", "tl.store(target, v"),
        ("((head + NUM_KV_HEADS) * D)", "((head + 1) * D)"),
        ("(context - 1).to(tl.int64) * D", "context.to(tl.int64) * 0"),
    ],
)
def test_planted_mistakes_in_the_rotating_split_kernel_are_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_launch, "attention", mutated(attention, old, new, tmp_path))
    found, expected = rope_results((4, 2, 64, 16), None, 8, torch.float32)
    same = [torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, expected, strict=True)]
    assert not all(same)


def test_only_single_rows_without_norms_are_rotated_by_the_split_kernel() -> None:
    cache = Paged([70], num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device="cpu")
    table, norm = torch.zeros(100, 16), torch.ones(16)
    plan = AttentionPlan(split_rope_up_to=64)
    single, several = cache.metadata([0], [1], [70]), cache.metadata([0], [2], [70])
    assert attention_launch.takes_rope(plan, single, Rotation(table, 2))
    assert not attention_launch.takes_rope(plan, several, Rotation(table, 2))
    assert not attention_launch.takes_rope(plan, single, Rotation(table, 2, norm, norm))
    assert not attention_launch.takes_rope(AttentionPlan(), single, Rotation(table, 2))
    two = cache.metadata([0, 0], [1, 1], [70, 70])
    assert attention_launch.takes_rope(AttentionPlan(split_rope_up_to=2), two, Rotation(table, 2))
    assert not attention_launch.takes_rope(AttentionPlan(split_rope_up_to=1), two, Rotation(table, 2))
    longer = replace(single, context_len_max=SPLIT_KEYS + 1)
    assert not attention_launch.takes_rope(plan, longer, Rotation(table, 2))
    assert attention_launch.takes_rope(plan, replace(single, context_len_max=SPLIT_KEYS), Rotation(table, 2))
    tiled = AttentionPlan(split_rope_up_to=64, few_rows_kind="tiled")
    assert not attention_launch.takes_rope(tiled, single, Rotation(table, 2))
    with pytest.raises(ValueError, match=r"qkv has 48 columns, expected \(2 \+ 2 \* 1\) \* 16"):
        attention_launch.run_rope_attention(
            torch.zeros(1, 48), cache.layer, single, Rotation(table, 2), 0.2, plan, 1
        )  # fmt: skip


@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache_write(normed: bool) -> None:
    torch.manual_seed(0)
    num_rows, num_heads, num_kv_heads, size, block = 9, 3, 1, 24, 16
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * size)
    cache = torch.full((4, 2, 2, num_kv_heads, block, size), 7.0, dtype=torch.float16)
    slots = torch.randperm(4 * block)[:num_rows]
    slots[2] = -1
    positions = torch.randint(0, 50, (num_rows,))
    angles = torch.arange(50)[:, None] * 1e4 ** (-torch.arange(0, size, 2) / size)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    norm = torch.rand(size) + 0.5 if normed else None
    empty = torch.zeros(1, dtype=torch.int32)
    metadata = AttentionMetadata(empty, empty, empty[None], slots, positions, 1, 1)
    q = launch.run_rope_and_cache(qkv, cache[:, 1], metadata, table, num_heads, norm, norm, 1e-6)

    heads = qkv.double().view(num_rows, -1, size)
    turned = heads[:, : num_heads + num_kv_heads]
    if norm is not None:
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    low, high = turned.chunk(2, dim=-1)
    cos, sin = table[positions].double()[:, None].chunk(2, dim=-1)
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    assert relative_error(q, turned[:, :num_heads]) < 1e-3
    kept = slots >= 0
    stored = [cache[slots[kept] // block, 1, which, :, slots[kept] % block] for which in (0, 1)]
    assert relative_error(stored[0], turned[kept, num_heads:]) < 1e-3
    assert relative_error(stored[1], heads[kept, num_heads + num_kv_heads :]) < 1e-3
    assert int((cache != 7.0).any(-1).sum()) == 2 * num_kv_heads * int(kept.sum())


def test_rms_norm_with_and_without_update() -> None:
    torch.manual_seed(0)
    x, update, weight = torch.randn(4, 96), torch.randn(4, 96).half(), torch.randn(96)
    expected = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    assert relative_error(launch.run_rms_norm(x, None, weight, 1e-5, torch.float32), expected) < 1e-6
    total = x + update
    out = launch.run_rms_norm(x, update, weight, 1e-5, torch.float32)
    assert torch.equal(x, total)
    assert relative_error(out, torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-5)) < 1e-6
    with pytest.raises(ValueError, match="in place"):
        launch.run_rms_norm(x[:, ::2], update[:, ::2], weight[::2], 1e-5, torch.float32)


def test_vocabulary_statistics() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9001)
    logits[1, 77] = logits[1, 5000] = 9.0
    logits[2, :] = float("-inf")
    logits[2, 8999] = 1.0
    logits[3, 3] = float("nan")
    maximum, logsumexp, ids = launch.run_vocab_stats(logits)
    assert torch.allclose(logsumexp[:3], logits[:3].logsumexp(-1), rtol=1e-6)
    assert bool(logsumexp[3].isnan())
    assert torch.equal(maximum[:3], logits[:3].max(-1).values)
    assert ids.tolist() == [int(logits[0].argmax()), 77, 8999, int(logits[3].nan_to_num(-100).argmax())]


def test_impossible_calls_are_refused() -> None:
    cache = Paged([20], num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    metadata = cache.metadata([0], [1], [20])
    with pytest.raises(ValueError, match="do not divide"):
        attention_launch.run_attention(cache.q[0][:1, :3], cache.layer, metadata, 0.1, AttentionPlan(), 4)
    with pytest.raises(ValueError, match="scale must be positive"):
        attention_launch.run_attention(cache.q[0][:1], cache.layer, metadata, 0.0, AttentionPlan(), 4)
    with pytest.raises(ValueError, match="window must hold"):
        attention_launch.run_attention(cache.q[0][:1], cache.layer, metadata, 0.1, AttentionPlan(), 4, window=0)


def test_digests_of_the_device_equal_those_of_the_host() -> None:
    """Parts of blocks, a block size and a head size that are no powers of two, a rank that is not the first."""
    torch.manual_seed(4)
    layout = KVLayout(num_layers=2, num_kv_heads=3, head_size=24, block_size=48)
    kv = torch.randn((5, 2, 2, 3, 48, 24)).bfloat16()
    digester = KVDigester(kv, layout, first_layer=4, first_kv_head=2)
    spans = [Span(3, 96, 0, 48), Span(1, 0, 5, 33), Span(4, 1 << 33, 47, 48)]
    host = digester._digester
    assert isinstance(host, digest._HostDigester)
    constants = {"A": digest._A, "B": digest._B, "C": digest._C, "M1": digest._M1, "M2": digest._M2}
    found = start_digests(
        kv.view(torch.int64), torch.from_numpy(host._key_W.view(np.int64)), torch.tensor(spans),
        first_layer=4, first_kv_head=2, constants=constants,
    )  # fmt: skip
    assert found.tolist() == digester.begin(spans).values().view(np.int64).tolist()
