"""Attention: one value per position however it was computed, from a cache with holes and stale NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probe_lists import ATTENTION_PROBES, ROPE_PROBES
from cluster.engine.kernels.probes import CacheShape, Magnitudes, PagedInputs, first_difference
from tests.unit.kernel_variants import ALL_VARIANTS, class_of, expected_outputs, native

FAST_VARIANTS = [variant for variant in ALL_VARIANTS if variant != "fma_portable"]
SMALL = CacheShape(32, 4, 2, 16, ((0, 1500),))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_native_attention_has_the_bits_of_the_reference(variant: str) -> None:
    for probe in (*ATTENTION_PROBES, *ROPE_PROBES):
        difference = first_difference(probe.run(native(variant)), expected_outputs(probe, class_of(variant)))
        assert difference is None, f"{probe.name}: {difference}"


def _chunked(ops: Ops, shape: CacheShape, chunk: int) -> torch.Tensor:
    inputs = PagedInputs(shape, ops.device)
    length = shape.sequences[0][1]
    return torch.cat([inputs.attend(ops, [(0, i, min(i + chunk, length))]) for i in range(0, length, chunk)])


@pytest.mark.parametrize("variant", FAST_VARIANTS)
def test_chunks_give_the_bits_of_one_prefill(variant: str) -> None:
    ops = native(variant)
    whole = _chunked(ops, SMALL, 1500)
    assert whole.isfinite().all()
    for chunk in (97, 256, 512):
        assert torch.equal(_chunked(ops, SMALL, chunk), whole), chunk


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize("head_size", [64, 48])
def test_single_rows_give_the_bits_of_prefill_at_split_boundaries(variant: str, head_size: int) -> None:
    shape = replace(SMALL, head_size=head_size, num_heads=6)
    ops = native(variant)
    whole = _chunked(ops, shape, 1500)
    inputs = PagedInputs(shape, ops.device)
    inputs.store(ops, [(0, 0, 1500)])  # later keys lie in the cache already and must not be seen
    for context in (1, 2, 16, 17, 255, 256, 257, 511, 512, 513, 1024, 1025, 1500):
        row = inputs.attend(ops, [(0, context - 1, context)])
        assert torch.equal(row[0], whole[context - 1]), context


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_neighbours_and_threads_change_nothing(variant: str, num_threads: int) -> None:
    shape = CacheShape(64, 6, 2, 32, ((0, 700), (0, 300), (0, 17), (0, 513)))
    alone = native(variant, 2)
    inputs = PagedInputs(shape, alone.device)
    expected = [inputs.attend(alone, [(i, 0, end)]) for i, (_, end) in enumerate(shape.sequences)]
    ops = native(variant, num_threads)
    for spans in (
        [(0, 0, 700), (1, 0, 300), (2, 0, 17), (3, 0, 513)],
        [(3, 512, 513), (0, 699, 700), (2, 16, 17), (1, 290, 300)],
        [(2, 0, 17), (3, 100, 513), (0, 255, 257)],
    ):
        together = inputs.attend(ops, spans)
        wanted = torch.cat([expected[sequence][start:end] for sequence, start, end in spans])
        assert torch.equal(together, wanted), spans


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_values_of_later_positions_never_reach_a_row(variant: str) -> None:
    """0 * inf is NaN: a later position's infinite value must not meet the rows before it in its tile."""
    shape = CacheShape(32, 4, 2, 16, ((0, 300),))
    ops = native(variant)
    inputs = PagedInputs(shape, ops.device)
    sound = inputs.attend(ops, [(0, 0, 300)])
    inputs.qkv_of_sequence[0][270, -32:] = torch.inf  # value of the last KV head
    inputs.qkv_of_sequence[0][100, 4 * 32 : 5 * 32] = torch.nan  # key of the first KV head
    broken = inputs.attend(ops, [(0, 0, 300)])
    assert torch.equal(broken[:100], sound[:100])
    assert torch.equal(broken[:270, 64:], sound[:270, 64:])
    assert broken[100:, :64].isnan().all()
    assert not broken[270:, 64:].isfinite().any()
    assert torch.equal(_rows(ops, inputs, range(260, 275))[:10, 64:], sound[260:270, 64:])


def _rows(ops: Ops, inputs: PagedInputs, positions: Sequence[int]) -> torch.Tensor:
    return torch.cat([inputs.attend(ops, [(0, position, position + 1)]) for position in positions])


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize(("head_size", "num_heads", "num_kv_heads"), [(64, 9, 3), (128, 4, 4), (96, 8, 1), (256, 2, 1)])
def test_attention_is_softmax_attention(variant: str, head_size: int, num_heads: int, num_kv_heads: int) -> None:
    shape = CacheShape(head_size, num_heads, num_kv_heads, 16, ((0, 600),))
    ops = native(variant)
    inputs = PagedInputs(shape, ops.device)
    q, metadata = inputs.store(ops, [(0, 0, 600)])
    ours = ops.attention(q, inputs.kv_N2GSD, metadata, head_size**-0.5)
    blocks = metadata.block_table[0].long()
    keys, values = inputs.kv_N2GSD[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :600].double()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(), keys, values, is_causal=True, enable_gqa=True
    )
    assert torch.allclose(ours.double(), exact.transpose(0, 1).flatten(1), atol=0.02, rtol=0.02)


def test_rope_keeps_to_the_formula_and_to_its_slots() -> None:
    ops = native("fma_portable")
    shape = CacheShape(32, 2, 1, 16, ((0, 20),), Magnitudes.NORMAL)
    inputs = PagedInputs(shape, ops.device)
    metadata = inputs.metadata([(0, 0, 20)])
    metadata.slot_mapping[5] = -1  # a padding row
    rows = inputs.qkv_of_sequence[0]
    q = ops.rope_and_cache(rows, inputs.kv_N2GSD, metadata, inputs.cos_sin_PD, 2)
    heads = rows.view(20, 4, 32)
    cos, sin = inputs.cos_sin_PD[:20, None].chunk(2, dim=2)
    first, second = heads[:, :3].chunk(2, dim=2)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2).bfloat16()
    assert torch.equal(q, rotated[:, :2])
    is_stored = torch.ones(20, dtype=torch.bool)
    is_stored[5] = False
    slots = metadata.slot_mapping[is_stored]
    blocks, offsets = slots // 16, slots % 16
    assert torch.equal(inputs.kv_N2GSD[blocks, 0, 0, offsets], rotated[is_stored, 2])
    assert torch.equal(inputs.kv_N2GSD[blocks, 1, 0, offsets], heads[is_stored, 3].bfloat16())
    inputs.kv_N2GSD[blocks, :, 0, offsets] = torch.nan
    assert inputs.kv_N2GSD.isnan().all()  # nothing else was written
