"""Sliding windows: a row sees its last keys only, with the same bits however it was computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cluster.engine.kernels.composed import DelegatingOps
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.mutations import MUTANTS
from cluster.engine.kernels.ops import AttentionMetadata, Ops
from cluster.engine.kernels.probe_lists import ATTENTION_PROBES
from cluster.engine.kernels.probes import CacheShape, Magnitudes, PagedInputs, first_difference
from tests.unit.kernel_variants import ALL_VARIANTS, native, reference

FAST_VARIANTS = [variant for variant in ALL_VARIANTS if variant != "fma_portable"]
LENGTH = 1100
SHAPE = CacheShape(32, 4, 2, 16, ((0, LENGTH),))
WINDOWS = [1, 24, 256, 300, 700]
WINDOWED_PROBES = [probe for probe in ATTENTION_PROBES if "window" in probe.name]


def _chunked(ops: Ops, shape: CacheShape, chunk: int) -> torch.Tensor:
    inputs = PagedInputs(shape, ops.device)
    length = shape.sequences[0][1]
    return torch.cat([inputs.attend(ops, [(0, i, min(i + chunk, length))]) for i in range(0, length, chunk)])


def _edges(window: int) -> list[int]:
    """Contexts whose last row's window begins or ends around the edges of splits and groups of keys."""
    edges = {1, 2, 16, 17, 255, 256, 257, 511, 512, 513, 1024, LENGTH}
    edges |= {start + window + step for start in (0, 32, 256, 512) for step in (-1, 0, 1)}
    return sorted(edge for edge in edges if 1 <= edge <= LENGTH)


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_whole_chunked_and_decoded_rows_have_the_same_bits(variant: str, window: int) -> None:
    ops, shape = native(variant), replace(SHAPE, window=window)
    whole = _chunked(ops, shape, LENGTH)
    assert whole.isfinite().all()
    for chunk in (97, 256):
        assert torch.equal(_chunked(ops, shape, chunk), whole), chunk
    inputs = PagedInputs(shape, ops.device)
    inputs.store(ops, [(0, 0, LENGTH)])
    for context in _edges(window):
        row = inputs.attend(ops, [(0, context - 1, context)])
        assert torch.equal(row[0], whole[context - 1]), context


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize("window", [24, 300])
def test_the_window_is_that_of_transformers(variant: str, window: int) -> None:
    ops, shape = native(variant), replace(SHAPE, window=window)
    inputs = PagedInputs(shape, ops.device)
    q, metadata = inputs.store(ops, [(0, 0, LENGTH)])
    ours = ops.attention(q, inputs.kv_N2GSD, metadata, 32**-0.5, window=window)
    blocks = metadata.block_table[0].long()
    keys, values = inputs.kv_N2GSD[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :LENGTH].double()
    q_idx, kv_idx = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(),
        keys,
        values,
        attn_mask=(kv_idx <= q_idx) & (kv_idx > q_idx - window),
        enable_gqa=True,
    )
    assert torch.allclose(ours.double(), exact.transpose(0, 1).flatten(1), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("variant", FAST_VARIANTS)
def test_a_window_that_holds_everything_is_full_attention(variant: str) -> None:
    ops = native(variant)
    assert torch.equal(_chunked(ops, replace(SHAPE, window=LENGTH), 300), _chunked(ops, SHAPE, 300))


@pytest.mark.parametrize("variant", FAST_VARIANTS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_neighbours_and_threads_change_nothing(variant: str, num_threads: int) -> None:
    shape = CacheShape(64, 6, 2, 32, ((0, 700), (0, 300), (0, 17), (0, 513)), window=70)
    alone = native(variant, 2)
    inputs = PagedInputs(shape, alone.device)
    expected = [inputs.attend(alone, [(i, 0, end)]) for i, (_, end) in enumerate(shape.sequences)]
    ops = native(variant, num_threads)
    for spans in (
        [(0, 0, 700), (1, 0, 300), (2, 0, 17), (3, 0, 513)],
        [(3, 512, 513), (0, 699, 700), (2, 16, 17), (1, 290, 300)],
        [(2, 0, 17), (3, 100, 513), (0, 255, 327)],
    ):
        together = inputs.attend(ops, spans)
        wanted = torch.cat([expected[sequence][start:end] for sequence, start, end in spans])
        assert torch.equal(together, wanted), spans


def _reference(variant: str) -> ReferenceOps:
    native(variant)  # skips where this machine cannot tell
    return reference(variant)


@pytest.mark.parametrize("make", [native, _reference])
@pytest.mark.parametrize("variant", ["fma_avx2", "avx512_bf16", "amx_bf16"])
def test_keys_and_values_before_the_window_are_as_if_they_were_not_there(
    make: Callable[[str], Ops], variant: str
) -> None:
    """Neither NaN nor infinity there reaches a row; those that see it are broken, and only they."""
    shape = CacheShape(32, 4, 2, 16, ((0, 330),), window=40)
    ops = make(variant)
    inputs = PagedInputs(shape, ops.device)
    sound = inputs.attend(ops, [(0, 0, 330)])
    inputs.qkv_of_sequence[0][200, -32:] = torch.inf  # value of the last KV head
    inputs.qkv_of_sequence[0][250, 4 * 32 : 5 * 32] = torch.nan  # key of the first KV head
    broken = inputs.attend(ops, [(0, 0, 330)])
    assert not broken[200:240, 64:].isfinite().any()
    assert broken[250:290, :64].isnan().all()
    for rows, columns in ((slice(240, None), slice(64, None)), (slice(290, None), slice(0, 64))):
        assert torch.equal(broken[rows, columns], sound[rows, columns])
    assert torch.equal(broken[:200, 64:], sound[:200, 64:])
    for position in (239, 240, 289, 290, 300, 329):
        row = inputs.attend(ops, [(0, position, position + 1)])
        assert torch.equal(row[0].nan_to_num(7.0), broken[position].nan_to_num(7.0)), position


@pytest.mark.parametrize("variant", FAST_VARIANTS)
def test_work_is_bounded_by_the_window(variant: str) -> None:
    """Blocks out of the window are not even looked up: their entries may point anywhere."""
    ops, shape = native(variant), replace(SHAPE, window=40)
    inputs = PagedInputs(shape, ops.device)
    inputs.store(ops, [(0, 0, LENGTH)])
    for start in (LENGTH - 1, LENGTH - 70):
        q, metadata = inputs.store(ops, [(0, start, LENGTH)])
        expected = ops.attention(q, inputs.kv_N2GSD, metadata, 0.2, window=40)
        metadata.block_table[0, : (start - 39) // 32 * 2] = 1 << 30
        assert torch.equal(ops.attention(q, inputs.kv_N2GSD, metadata, 0.2, window=40), expected)


class OneKeyFewer(DelegatingOps):
    """Off by one for all rows alike: invariant, and wrong."""

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        return super().attention(q_THD, kv_N2GSD, metadata, scale, window=window and max(1, window - 1))


class WindowOfTheLongest(DelegatingOps):
    """The window counted from the end of the longest context of the batch."""

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        parts = []
        starts = metadata.query_start.tolist()
        for index, context in enumerate(metadata.context_len.tolist()):
            rows = slice(starts[index], starts[index + 1])
            own = replace(
                metadata,
                query_start=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
                context_len=metadata.context_len[index : index + 1],
                block_table=metadata.block_table[index : index + 1],
            )
            moved = window and max(1, window - (metadata.context_len_max - context))
            parts.append(super().attention(q_THD[rows].contiguous(), kv_N2GSD, own, scale, window=moved))
        return torch.cat(parts)


@pytest.mark.parametrize("mutant", [OneKeyFewer, WindowOfTheLongest, MUTANTS["window"]])
def test_a_wrong_window_is_refused_by_the_probes(mutant: type[DelegatingOps]) -> None:
    ops = native("fma_avx2")
    found = [first_difference(probe.run(mutant(ops)), probe.run(ops)) for probe in WINDOWED_PROBES]
    assert any(found)


def test_a_window_that_is_off_by_one_for_single_rows_is_found() -> None:
    ops = MUTANTS["window"](native("fma_avx2"))
    shape = replace(SHAPE, window=24, magnitudes=Magnitudes.NORMAL)
    assert not torch.equal(_chunked(ops, replace(shape, sequences=((0, 60),)), 1), _chunked(ops, shape, 60)[:60])


def test_a_window_without_keys_is_refused() -> None:
    inputs = PagedInputs(SHAPE, torch.device("cpu"))
    ops = native("fma_avx2")
    q, metadata = inputs.store(ops, [(0, 0, 5)])
    with pytest.raises(AssertionError):
        ops.attention(q, inputs.kv_N2GSD, metadata, 0.2, window=0)
