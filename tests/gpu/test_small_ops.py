"""Norms, rotary embedding with cache write, vocabulary statistics: right, and the same bits anywhere."""

from __future__ import annotations

import pytest
import torch

from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.ops import AttentionMetadata
from tests.gpu.support import bits_equal, in_graph, relative_error


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


@pytest.mark.parametrize("width", [576, 1000, 2048, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(ops: CudaOps, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn((300, width), device="cuda") * torch.exp2(torch.randint(-9, 9, (300, width), device="cuda"))).to(
        dtype
    )
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    whole = ops.rms_norm(x, weight, 1e-5)
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert relative_error(whole, exact) < 3e-3
    for start, count in ((0, 1), (7, 1), (299, 1), (3, 64)):
        assert bits_equal(ops.rms_norm(x[start : start + count], weight, 1e-5), whole[start : start + count])
    shifted = torch.empty(300 * width + 3, device="cuda", dtype=dtype)[3:].view(300, width)
    shifted.copy_(x)
    assert bits_equal(ops.rms_norm(shifted, weight, 1e-5), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_updates_then_normalises(ops: CudaOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residual = torch.randn((50, 4096), device="cuda", dtype=dtype)
    update = torch.randn((50, 4096), device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    expected = (residual.float() + update.float()).to(dtype)
    out = ops.add_rms_norm(residual, update, weight, 1e-6)
    assert bits_equal(residual, expected)
    assert bits_equal(out, ops.rms_norm(expected, weight, 1e-6))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(32, 8, 128), (9, 3, 64), (6, 2, 96)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache(ops: CudaOps, num_heads: int, num_kv_heads: int, head_size: int, normed: bool) -> None:
    torch.manual_seed(0)
    num_rows, block = 70, 32
    columns = (num_heads + 2 * num_kv_heads) * head_size
    qkv = torch.randn((num_rows, columns), device="cuda")
    cache = torch.full((8, 3, 2, num_kv_heads, block, head_size), 7.0, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(8 * block, device="cuda")[:num_rows]
    slots[5] = -1
    positions = torch.randint(0, 5000, (num_rows,), device="cuda")
    frequencies = 1e4 ** (-torch.arange(0, head_size, 2, device="cuda", dtype=torch.float64) / head_size)
    angles = torch.arange(5000, device="cuda")[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    norms = [torch.randn(head_size, device="cuda", dtype=torch.bfloat16) for _ in range(2)] if normed else [None, None]

    def metadata(rows: slice) -> AttentionMetadata:
        empty = torch.zeros(1, dtype=torch.int32, device="cuda")
        return AttentionMetadata(empty, empty, empty[None], slots[rows], positions[rows], 1, 1)

    q = ops.rope_and_cache(qkv, cache[:, 1], metadata(slice(None)), table, num_heads, norms[0], norms[1], 1e-6)

    heads = qkv.double().view(num_rows, -1, head_size)
    parts = list(heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1))
    for index, weight in enumerate(norms):
        if weight is not None:
            scale = torch.rsqrt(parts[index].square().mean(-1, keepdim=True) + 1e-6)
            parts[index] = parts[index] * scale * weight.double()
    cos, sin = table[positions].double()[:, None].chunk(2, dim=-1)
    for index in (0, 1):
        low, high = parts[index].chunk(2, dim=-1)
        parts[index] = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    assert relative_error(q, parts[0]) < 3e-3
    kept = slots >= 0
    for index in (0, 1):
        stored = cache[slots[kept] // block, 1, index, :, slots[kept] % block]
        assert relative_error(stored, parts[1 + index][kept]) < 3e-3
    assert int((cache[:, 1] != 7.0).any(-1).sum()) <= 2 * num_kv_heads * int(kept.sum())
    assert bool((cache[:, 0] == 7.0).all())
    assert bool((cache[:, 2] == 7.0).all())

    again = torch.full_like(cache, 7.0)
    for rows in (slice(0, 1), slice(1, 20), slice(20, None)):
        piece = ops.rope_and_cache(qkv[rows], again[:, 1], metadata(rows), table, num_heads, norms[0], norms[1], 1e-6)
        assert bits_equal(piece, q[rows])
    assert bits_equal(again, cache)


def test_rope_of_a_head_shard_has_the_same_bits(ops: CudaOps) -> None:
    """Tensor parallel ranks hold some of the heads; norms inside the kernel must not notice."""
    torch.manual_seed(0)
    qkv = torch.randn((33, 16 * 64), device="cuda")  # 8 query, 4 key, 4 value heads
    norm = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    table = torch.randn((64, 64), device="cuda")
    rows = torch.arange(33, device="cuda")
    empty = torch.zeros(1, dtype=torch.int32, device="cuda")
    metadata = AttentionMetadata(empty, empty, empty[None], rows, rows, 1, 1)
    whole_cache = torch.zeros((2, 2, 4, 32, 64), device="cuda", dtype=torch.bfloat16)
    whole = ops.rope_and_cache(qkv, whole_cache, metadata, table, 8, norm, norm, 1e-6)
    heads = qkv.view(33, 16, 64)
    shard_cache = torch.zeros((2, 2, 1, 32, 64), device="cuda", dtype=torch.bfloat16)
    for rank in range(4):
        part = torch.cat(
            [heads[:, 2 * rank : 2 * rank + 2], heads[:, 8 + rank, None], heads[:, 12 + rank, None]], dim=1
        )
        q = ops.rope_and_cache(part.flatten(1), shard_cache, metadata, table, 2, norm, norm, 1e-6)
        assert bits_equal(q, whole[:, 2 * rank : 2 * rank + 2])
        assert bits_equal(shard_cache[:, :, 0], whole_cache[:, :, rank])


@pytest.mark.parametrize("vocabulary", [1000, 49152, 50257, 128256])
def test_log_softmax_stats_and_argmax(ops: CudaOps, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn((40, vocabulary), device="cuda") * 5
    logits[3, 77] = logits[3, 900] = 50.0
    logits[4, 5] = float("nan")
    logits[5, : vocabulary - 1] = float("-inf")
    maximum, logsumexp = ops.log_softmax_stats(logits)
    assert bits_equal(maximum[:4], logits[:4].max(-1).values)
    keep = torch.arange(40, device="cuda") != 4
    assert torch.allclose(logsumexp[keep].double(), logits[keep].double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert bool(logsumexp[4].isnan())
    ids = ops.argmax(logits)
    assert int(ids[3]) == 77
    assert bool((ids[keep] == logits[keep].argmax(-1)).all())
    assert bool((ids < vocabulary).all())
    for start, count in ((0, 1), (39, 1), (1, 7)):
        again = ops.log_softmax_stats(logits[start : start + count])
        assert bits_equal(again[1], logsumexp[start : start + count])
    assert bits_equal(in_graph(lambda: ops.log_softmax_stats(logits)[1]), logsumexp)


def test_an_empty_step_is_fine(ops: CudaOps) -> None:
    weight = ops.pack_linear(torch.randn((64, 32), device="cuda", dtype=torch.bfloat16))
    assert ops.linear(torch.empty((0, 32), device="cuda", dtype=torch.bfloat16), weight).shape == (0, 64)
    assert ops.rms_norm(torch.empty((0, 64), device="cuda"), torch.ones(64, device="cuda"), 1e-5).shape == (0, 64)
    assert ops.log_softmax_stats(torch.empty((0, 64), device="cuda"))[0].shape == (0,)
