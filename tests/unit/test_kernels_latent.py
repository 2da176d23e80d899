"""Latent attention on a CPU: one value per position however it was computed; the choice of experts by group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.engine.kernels import fingerprint, get_ops
from cluster.engine.kernels.ops import GroupedRouting, Ops
from cluster.engine.kernels.probe_lists import LATENT_PROBES
from cluster.engine.kernels.probes import first_difference
from cluster.engine.kernels.probes_latent import LatentInputs, LatentShape
from cluster.engine.kernels.probes_moe import router_logits
from tests.unit.kernel_variants import ALL_VARIANTS, class_of, expected_outputs, native

FEW_VARIANTS = ["avx512_bf16", "fma_avx2"]  # the rest differ in `linear` alone, which has tests of its own
SMALL = LatentShape(32, 16, 2, 16, ((0, 600),))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_native_operations_have_the_bits_of_the_reference(variant: str) -> None:
    for probe in LATENT_PROBES:
        difference = first_difference(probe.run(native(variant)), expected_outputs(probe, class_of(variant)))
        assert difference is None, f"{probe.name}: {difference}"


def _chunked(ops: Ops, shape: LatentShape, chunk: int) -> torch.Tensor:
    inputs = LatentInputs(shape, ops.device)
    length = shape.sequences[0][1]
    return torch.cat([inputs.attend(ops, [(0, i, min(i + chunk, length))]) for i in range(0, length, chunk)])


@pytest.mark.parametrize("variant", FEW_VARIANTS)
def test_chunks_and_single_rows_give_the_bits_of_one_prefill(variant: str) -> None:
    ops = native(variant)
    whole = _chunked(ops, SMALL, 600)
    assert whole.isfinite().all()
    for chunk in (97, 256):
        assert torch.equal(_chunked(ops, SMALL, chunk), whole), chunk
    inputs = LatentInputs(SMALL, ops.device)
    inputs.store(ops, [(0, 0, 600)])  # later rows lie in the cache already and must not be seen
    for context in (1, 2, 16, 17, 255, 256, 257, 511, 512, 513, 600):
        row = inputs.attend(ops, [(0, context - 1, context)])
        assert torch.equal(row[0], whole[context - 1]), context


@pytest.mark.parametrize("variant", FEW_VARIANTS)
def test_neighbours_and_block_sizes_change_nothing(variant: str) -> None:
    ops = native(variant)
    shape = replace(SMALL, sequences=((0, 300), (0, 17), (0, 260)))
    inputs = LatentInputs(shape, ops.device)
    expected = [inputs.attend(ops, [(i, 0, end)]) for i, (_, end) in enumerate(shape.sequences)]
    larger = LatentInputs(replace(shape, block_size=64), ops.device)
    for spans in ([(0, 0, 300), (1, 0, 17), (2, 0, 260)], [(2, 255, 257), (0, 299, 300), (1, 3, 17)]):
        wanted = torch.cat([expected[sequence][start:end] for sequence, start, end in spans])
        assert torch.equal(inputs.attend(ops, spans), wanted), spans
        larger.store(ops, [(i, 0, end) for i, (_, end) in enumerate(shape.sequences)])
        assert torch.equal(larger.attend(ops, spans), wanted), spans


@pytest.mark.parametrize("variant", FEW_VARIANTS)
def test_rows_of_later_positions_never_reach_a_row(variant: str) -> None:
    ops = native(variant)
    inputs = LatentInputs(replace(SMALL, sequences=((0, 300),)), ops.device)
    inputs.store(ops, [(0, 0, 260)])
    sound = inputs.attend(ops, [(0, 260, 300)])
    inputs.rows[0][280, 5] = torch.inf
    broken = inputs.attend(ops, [(0, 260, 300)])
    assert torch.equal(broken[:20], sound[:20])
    assert not broken[20:, :, 5].isfinite().any()


@pytest.mark.parametrize("variant", FEW_VARIANTS)
def test_it_is_softmax_attention_over_the_stored_rows(variant: str) -> None:
    ops = native(variant)
    shape = replace(SMALL, latent_size=512, rope_size=64, sequences=((0, 300),))
    inputs = LatentInputs(shape, ops.device)
    spans = [(0, 0, 300)]
    q_nope, q_rope = inputs.store(ops, spans)
    assert torch.equal(q_nope, inputs.queries[0].view(300, shape.num_heads, -1)[:, :, : q_nope.shape[2]].bfloat16())
    q_latent = ops.head_linear(q_nope, ops.pack_heads(inputs.up_HNK))
    exact_latent = torch.einsum("thk,hnk->thn", q_nope.double(), inputs.up_HNK.double())
    assert torch.allclose(q_latent.double(), exact_latent, atol=0.02, rtol=0.02)
    metadata = inputs.metadata(spans)
    rows = inputs.kv_N11SD[metadata.block_table[0].long(), 0, 0].flatten(0, 1)[:300].double()
    exact_norm = torch.nn.functional.rms_norm(inputs.rows[0][:, :512], (512,), inputs.norm_L, 1e-6)
    assert torch.allclose(rows[:, :512], exact_norm.double(), atol=0.02, rtol=0.02)
    q = torch.cat([q_latent, q_rope], dim=2).double()
    scores = torch.einsum("thd,cd->htc", q, rows) * inputs.scale
    weights = scores.masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=2)
    exact = torch.einsum("htc,cl->thl", weights, rows[:, :512])
    ours = ops.latent_attention(q_latent, q_rope, inputs.kv_N11SD, metadata, inputs.scale)
    assert torch.allclose(ours.double(), exact, atol=0.02, rtol=0.02)


def test_a_fingerprint_covers_it_where_the_model_needs_it() -> None:
    ops = get_ops("cpu", 1)
    assert fingerprint(ops, with_latent=True) == fingerprint(get_ops("cpu", 3), with_latent=True)
    assert fingerprint(ops, with_latent=True) != fingerprint(ops)


def routing(scoring: str, num_groups: int, top_groups: int, top_k: int, *, renormalise: bool = False) -> GroupedRouting:
    return GroupedRouting(top_k, num_groups, top_groups, scoring, renormalise, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (5, 2), (8, 8)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_choice_of_experts_by_group(scoring: str, num_groups: int, top_groups: int, renormalise: bool) -> None:
    """Against the rule written with sorted lists; ties are frequent."""
    logits = router_logits(30, 40, seed=2)
    bias = (torch.arange(40) % 4 / 8) if scoring == "sigmoid" else torch.zeros(40)
    rule = routing(scoring, num_groups, top_groups, 4, renormalise=renormalise)
    choice = native("fma_portable").moe_route_grouped(logits, bias if scoring == "sigmoid" else None, rule)
    size = 40 // num_groups
    for row in range(32):
        scores = logits[row].sigmoid() if scoring == "sigmoid" else logits[row].double().softmax(dim=0).float()
        ranking = (scores + bias).tolist()
        parts = [sorted(ranking[group * size : (group + 1) * size], reverse=True) for group in range(num_groups)]
        values = [part[0] + part[1] if scoring == "sigmoid" else part[0] for part in parts]
        groups = sorted(range(num_groups), key=lambda group: (-values[group], group))[:top_groups]
        ranked = sorted(range(40), key=lambda expert: (expert // size not in groups, -ranking[expert], expert))
        assert choice.experts_TJ[row].tolist() == sorted(ranked[:4]), row
        wanted = scores[choice.experts_TJ[row].long()].double()
        wanted = 2.0 * (wanted / wanted.sum().clamp_min(2.0**-40) if renormalise else wanted)
        assert torch.allclose(choice.weights_TJ[row].double(), wanted, rtol=1e-5, atol=1e-12)
    assert choice.experts_TJ[32].tolist() == [0, 1, 2, 3]  # a row with NaN
    assert choice.weights_TJ[32].isnan().all()
