"""Latent attention: one value per (row, head), whichever path, chunk, tile, batch or block size computed it.

Few variants of each kernel: every one is compiled here. Values are compared as fp32, before they are rounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.gpu.exactness import Cell, Exactness, compare, make_requests, standard_cells
from benchmarks.gpu.random_model import DEEPSEEK_V3, random_decoder
from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.ops import GroupedRouting
from cluster.engine.kernels.probe_lists import LATENT_PROBES
from cluster.engine.kernels.probes import Magnitudes, draw
from cluster.engine.kernels.probes_latent import LatentInputs, LatentShape
from cluster.engine.kernels.probes_moe import router_logits
from cluster.engine.kernels.triton import attention, latent, latent_launch
from cluster.engine.kernels.triton.plans import LatentPlan
from cluster.engine.models.config import NoScaling
from tests.gpu.support import NUM_MULTIPROCESSORS, bits_equal, in_graph, mutated, num_differing, relative_error
from tests.gpu.support_admission import differing_probes
from tests.gpu.support_latent import PagedLatent

CONTEXTS = [1700, 700, 64, 1, 513]
PLANS = {
    "16 rows, whole": LatentPlan(prefill_block_rows=16, prefill_halves=False, prefill_num_stages=1),
    "32 rows, whole": LatentPlan(prefill_block_rows=32, prefill_halves=False, split_num_warps=4),
    "split in halves": LatentPlan(split_halves=True, split_num_stages=1, split_programs_per_multiprocessor=2),
}


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


@pytest.fixture(scope="module")
def cache() -> PagedLatent:
    return PagedLatent(CONTEXTS)


@pytest.fixture(scope="module")
def whole(cache: PagedLatent) -> list[torch.Tensor]:
    """Every row of every sequence, each sequence alone through the prefill kernel (or its single row)."""
    return [cache.attend([index], [context])[0] for index, context in enumerate(CONTEXTS)]


def test_it_is_softmax_attention(cache: PagedLatent, whole: list[torch.Tensor]) -> None:
    for index, out in enumerate(whole):
        assert relative_error(out, cache.expected(index)) < 1e-2


@pytest.mark.parametrize("chunk", [3, 97, 512])
def test_chunks_give_the_bits_of_one_prefill(cache: PagedLatent, whole: list[torch.Tensor], chunk: int) -> None:
    starts = range(0, 1700, chunk) if chunk > 3 else range(510, 516, chunk)
    for start in starts:
        stop = min(start + chunk, 1700)
        out = cache.attend([0], [stop - start], [stop])[0]
        assert num_differing(out, whole[0][start:stop]) == 0, start


def test_single_rows_give_the_bits_of_prefill(cache: PagedLatent, whole: list[torch.Tensor]) -> None:
    for context in (1, 2, 63, 64, 65, 511, 512, 513, 1024, 1025, 1536, 1537, 1700):
        assert num_differing(cache.attend([0], [1], [context])[0], whole[0][context - 1 : context]) == 0, context


@pytest.mark.parametrize("rows", [[1, 1, 1, 1, 1], [4, 2, 1, 1, 3], [1700, 1, 64, 1, 300], [5, 700, 1, 1, 1]])
def test_neighbours_change_nothing(cache: PagedLatent, whole: list[torch.Tensor], rows: list[int]) -> None:
    for index, out in enumerate(cache.attend([0, 1, 2, 3, 4], rows)):
        assert num_differing(out, whole[index][-rows[index] :]) == 0, index


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_the_same_bits(cache: PagedLatent, whole: list[torch.Tensor], name: str) -> None:
    for rows in ([300, 700, 1, 1, 33], [1, 1, 1, 1, 1]):
        for index, out in enumerate(cache.attend([0, 1, 2, 3, 4], rows, plan=PLANS[name])):
            assert num_differing(out, whole[index][-rows[index] :]) == 0, (rows, index)


def test_block_size_changes_nothing(cache: PagedLatent, whole: list[torch.Tensor]) -> None:
    small = PagedLatent([700], block_size=16)
    small.q, small.q_rope = cache.q[1:2], cache.q_rope[1:2]
    places = torch.arange(700, device="cuda")
    theirs = cache.table[1][places // 64].long(), places % 64
    ours = small.table[0][places // 16].long(), places % 16
    small.layer[ours[0], 0, 0, ours[1]] = cache.layer[theirs[0], 0, 0, theirs[1]]
    assert num_differing(small.attend([0], [700])[0], whole[1]) == 0
    assert num_differing(small.attend([0], [1])[0], whole[1][-1:]) == 0


def test_heads_of_a_group_and_of_a_rank_have_the_bits_they_have_among_all() -> None:
    """128 heads come in two groups; a rank with 16 of them computes the same numbers."""
    many = PagedLatent([600], num_heads=128)
    prefill = many.attend([0], [600])[0]
    assert relative_error(prefill[-20:], many.expected(0)[-20:]) < 1e-2
    assert num_differing(many.attend([0], [1])[0], prefill[-1:]) == 0
    q, q_rope = (each[0][:, 32:48].contiguous() for each in (many.q, many.q_rope))
    metadata = many.metadata([0], [600], [600])
    part = latent_launch.run_latent_attention(
        q, q_rope, many.layer, metadata, many.scale, LatentPlan(), NUM_MULTIPROCESSORS, torch.float32
    )
    assert num_differing(part, prefill[:, 32:48]) == 0


def test_a_captured_step_serves_other_lengths(cache: PagedLatent, whole: list[torch.Tensor]) -> None:
    metadata = cache.metadata([0, 1, 4], [1, 1, 1], [1700, 700, 513])
    q, q_rope = (torch.cat([each[index][-1:] for index in (0, 1, 4)]) for each in (cache.q, cache.q_rope))
    out = in_graph(
        lambda: latent_launch.run_latent_attention(
            q, q_rope, cache.layer, metadata, cache.scale, LatentPlan(), NUM_MULTIPROCESSORS, torch.float32
        )
    )
    assert bits_equal(out, torch.cat([whole[index][-1:] for index in (0, 1, 4)]))


def test_planted_reversed_fold_is_found(
    cache: PagedLatent, whole: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutated(attention, "(before + split) * NUM", "(before + num_splits - 1 - split) * NUM", tmp_path)
    monkeypatch.setattr(latent_launch, "attention", broken)
    assert num_differing(cache.attend([0], [1])[0], whole[0][-1:]) > 0


def test_planted_order_of_a_score_is_found(
    cache: PagedLatent, whole: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a half of the value is computed, scores come from two pieces in one chain. (A sum of two chains would be
    no mistake: the compiler makes one of them.)"""
    old = "s = tl.dot(q_second, tl.trans(second), tl.dot(q, tl.trans(first)))"
    new = "s = tl.dot(q, tl.trans(first), tl.dot(q_second, tl.trans(second)))"
    monkeypatch.setattr(latent_launch, "latent", mutated(latent, old, new, tmp_path))
    out = cache.attend([1], [97])[0]
    assert relative_error(out, whole[1][-97:]) < 1e-2
    assert num_differing(out, whole[1][-97:]) > 0


def test_planted_moving_splits_are_found(
    cache: PagedLatent, whole: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits that end 64 keys early but for the last one, which is longer."""
    broken = mutated(
        latent, "first_key = split * SPLIT_KEYS", "first_key = split * SPLIT_KEYS - 64 * (split > 0)", tmp_path
    )
    old = "tl.minimum(first_key + SPLIT_KEYS, context)"
    new = "tl.minimum((split + 1) * SPLIT_KEYS - 64, context) if (split + 1) * SPLIT_KEYS < context else context"
    monkeypatch.setattr(latent_launch, "latent", mutated(broken, old, new, tmp_path))
    out = cache.attend([0], [1])[0]
    assert relative_error(out, whole[0][-1:]) < 1e-2
    assert num_differing(out, whole[0][-1:]) > 0


@pytest.mark.parametrize(("outputs", "inputs"), [(512, 128), (128, 512)])
def test_a_product_per_head_has_the_bits_of_a_linear_layer(ops: CudaOps, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x = draw(generator, 300 * 3, inputs, Magnitudes.CANCELLING).bfloat16().view(300, 3, inputs).cuda()
    weight = draw(generator, 3 * outputs, inputs, Magnitudes.NORMAL).bfloat16().view(3, outputs, inputs).cuda()
    packed = ops.pack_heads(weight)
    wanted = torch.stack([ops.linear(x[:, h].contiguous(), ops.pack_linear(weight[h])) for h in range(3)], dim=1)
    for rows in (1, 17, 64, 300):
        assert num_differing(ops.head_linear(x[:rows], packed), wanted[:rows]) == 0, rows


def test_rows_are_cached_with_the_same_bits_in_any_step(ops: CudaOps) -> None:
    """At once, one by one, and cut out of a wider row that begins at another alignment."""
    shape = LatentShape(512, 64, 16, 64, ((0, 300),))
    inputs = LatentInputs(shape, ops.device)
    at_once = inputs.store(ops, [(0, 0, 300)])
    cached = inputs.kv_N11SD.clone()
    for start, stop in ((0, 1), (1, 7), (7, 100)):
        inputs.kv_N11SD.fill_(torch.nan)
        for ours, theirs in zip(inputs.store(ops, [(0, start, stop)]), at_once, strict=True):
            assert bits_equal(ours, theirs[start:stop])
        stored = ~inputs.kv_N11SD.isnan().all(dim=-1)
        assert int(stored.sum()) == stop - start
        assert bits_equal(inputs.kv_N11SD[stored], cached[stored])
    wide = torch.empty((300, 576 + 7), device="cuda")[:, 7:].copy_(inputs.rows[0])
    inputs.kv_N11SD.fill_(torch.nan)
    ops.latent_rope_and_cache(
        inputs.queries[0], wide, inputs.kv_N11SD, inputs.metadata([(0, 0, 300)]), inputs.cos_sin_PR, 16, inputs.norm_L,
        1e-6,
    )  # fmt: skip
    assert bits_equal(inputs.kv_N11SD, cached)
    exact = torch.nn.functional.rms_norm(wide[:, :512].double(), (512,), inputs.norm_L.double(), 1e-6)
    blocks = inputs.metadata([(0, 0, 300)]).block_table[0].long()
    assert relative_error(cached[blocks, 0, 0].flatten(0, 1)[:300, :512], exact) < 5e-3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "num_groups", "top_groups"), [(160, 8, 3), (256, 8, 4), (64, 1, 1)])
def test_choice_of_experts(ops: CudaOps, scoring: str, num_experts: int, num_groups: int, top_groups: int) -> None:
    logits = router_logits(200, num_experts, seed=3)
    bias = torch.randint(-4, 4, (num_experts,)) / 8 if scoring == "sigmoid" else None
    rule = GroupedRouting(6, num_groups, top_groups, scoring, scoring == "sigmoid", 2.5)  # type: ignore[arg-type]
    on_device = None if bias is None else bias.cuda()
    choice = ops.moe_route_grouped(logits.cuda(), on_device, rule)
    wanted = ReferenceOps(InstructionClass.FMA).moe_route_grouped(logits, bias, rule)
    assert torch.equal(choice.experts_TJ.cpu(), wanted.experts_TJ)
    assert torch.allclose(choice.weights_TJ.cpu(), wanted.weights_TJ, rtol=1e-5, atol=1e-9, equal_nan=True)
    for row in (0, 7, 199):
        alone = ops.moe_route_grouped(logits[row : row + 1].cuda(), on_device, rule)
        assert bits_equal(alone.weights_TJ, choice.weights_TJ[row : row + 1])


def test_probes_have_the_same_bits_with_another_plan(ops: CudaOps) -> None:
    other = CudaOps(torch.device("cuda"))
    other.latent_plan = PLANS["16 rows, whole"]
    assert differing_probes(other, ops, LATENT_PROBES) == {}


def test_the_engine_gives_the_same_bits_in_every_way_to_compute(ops: CudaOps) -> None:
    assert DEEPSEEK_V3.experts is not None
    assert DEEPSEEK_V3.latent is not None
    config = msgspec.structs.replace(
        DEEPSEEK_V3, hidden_size=512, num_layers=3, num_heads=16, ffn_size=1024, vocab_size=3000, max_position=4096,
        rope_scaling=NoScaling(), bos_token_id=1, eos_token_ids=(2,),
        experts=msgspec.structs.replace(
            DEEPSEEK_V3.experts, num_experts=32, top_k=4, ffn_size=256, dense_layers=(0,), num_groups=4, top_groups=2
        ),
        latent=msgspec.structs.replace(DEEPSEEK_V3.latent, q_lora_rank=256),
    )  # fmt: skip
    model = random_decoder(config, ops, std=0.06)
    limits: dict[str, Any] = {"max_num_sequences": 16, "max_batched_tokens": 1100, "kv_cache_bytes": 128 << 20}
    requests = make_requests(18, config.vocab_size, 8)
    cells = [
        *standard_cells((3, 16), (97,)),
        Cell("one by one, warm", 1, {"enable_prefix_caching": True}, is_warm=True),
    ]
    count, mismatches = compare(Exactness(model, ops, requests, max_model_len=2048, **limits), cells)
    assert count == len(cells)
    assert mismatches == []
