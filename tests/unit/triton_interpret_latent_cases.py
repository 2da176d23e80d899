"""The kernels of latent attention in Triton's interpreter: indexing, masks and formulas, not bits or speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.reference import ReferenceOps
from cluster.engine.kernels.ops import AttentionMetadata, GroupedRouting
from cluster.engine.kernels.probes_moe import router_logits
from cluster.engine.kernels.triton import latent_launch, moe_launch
from cluster.engine.kernels.triton.plans import LatentPlan, LinearPlan
from cluster.engine.kv_cache import KVLayout
from kvconnector import digest
from kvconnector.digest import KVDigester, Span
from kvconnector.digest_kernel import start_digests
from tests.gpu.support import relative_error
from tests.gpu.support_latent import PagedLatent


@pytest.mark.parametrize(
    ("num_heads", "latent_size", "rope_size", "block_size"), [(4, 32, 16, 64), (6, 48, 8, 16), (3, 64, 16, 128)]
)
def test_attention(num_heads: int, latent_size: int, rope_size: int, block_size: int) -> None:
    """Mixed batches over a cache whose unused slots hold NaN and whose table has wild entries past the end."""
    contexts = [530, 70, 1]
    cache = PagedLatent(
        contexts, num_heads=num_heads, latent_size=latent_size, rope_size=rope_size, block_size=block_size,
        dtype=torch.float16, device="cpu",
    )  # fmt: skip
    expected = [cache.expected(index) for index in range(3)]
    for rows, halves in (([3, 1, 1], False), ([2, 1, 1], True), ([20, 33, 1], False), ([20, 33, 1], True)):
        plan = LatentPlan(prefill_block_rows=32, prefill_halves=halves, split_halves=halves)
        for index, out in enumerate(cache.attend([0, 1, 2], rows, plan=plan)):
            assert relative_error(out, expected[index][-rows[index] :]) < 2e-3, (rows, index)


def test_many_heads_come_in_groups_and_a_prefix_does_not_see_what_follows() -> None:
    cache = PagedLatent([530], num_heads=24, latent_size=32, rope_size=16, dtype=torch.float16, device="cpu")
    expected = cache.expected(0)
    plan = LatentPlan(split_block_rows=16, prefill_block_rows=16)
    for rows, context in ((1, 1), (1, 65), (1, 513), (3, 514)):
        out = cache.attend([0], [rows], [context], plan=plan)[0]
        assert relative_error(out, expected[context - rows : context]) < 2e-3


def test_rope_and_cache_write() -> None:
    torch.manual_seed(0)
    num_rows, num_heads, nope, latent, rope, block = 9, 3, 20, 24, 8, 16
    both = torch.randn(num_rows, num_heads * (nope + rope) + latent + rope)
    queries, row = torch.split(both, [num_heads * (nope + rope), latent + rope], dim=1)
    cache = torch.full((4, 2, 1, 1, block, latent + rope), 7.0, dtype=torch.float16)
    slots = torch.randperm(4 * block)[:num_rows]
    slots[2] = -1
    positions = torch.randint(0, 50, (num_rows,))
    angles = torch.arange(50)[:, None] * 1e4 ** (-torch.arange(0, rope, 2) / rope)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    norm = torch.rand(latent) + 0.5
    empty = torch.zeros(1, dtype=torch.int32)
    metadata = AttentionMetadata(empty, empty, empty[None], slots, positions, 1, 1)
    q_nope, q_rope = latent_launch.run_latent_rope_and_cache(
        queries, row, cache[:, 1], metadata, table, num_heads, norm, 1e-6
    )

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.double().chunk(2, dim=-1)
        cos, sin = table[positions].double()[:, None].chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    heads = queries.view(num_rows, num_heads, -1)
    assert torch.equal(q_nope, heads[:, :, :nope].half())
    assert relative_error(q_rope, turned(heads[:, :, nope:])) < 1e-3
    kept = slots >= 0
    stored = cache[slots[kept] // block, 1, 0, 0, slots[kept] % block]
    normed = torch.nn.functional.rms_norm(row[:, :latent].double(), (latent,), norm.double(), 1e-6)
    wanted = torch.cat([normed, turned(row[:, None, latent:])[:, 0]], dim=1)
    assert relative_error(stored, wanted[kept]) < 1e-3
    assert int((cache != 7.0).any(-1).sum()) == int(kept.sum())


@pytest.mark.parametrize("plan", [LinearPlan(block_m=16, block_n=32, block_k=32, swap=True), LinearPlan()])
@pytest.mark.parametrize("num_rows", [1, 21])
def test_a_product_per_head(plan: LinearPlan, num_rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(num_rows, 3, 40).half(), torch.randn(3, 24, 40).half()
    out = latent_launch.run_head_linear(x, w, plan)
    assert relative_error(out, torch.einsum("thk,hnk->thn", x.double(), w.double())) < 1e-3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "num_groups", "top_groups"), [(40, 1, 1), (40, 5, 2), (64, 8, 8), (8, 8, 5)])
def test_choice_of_experts(scoring: str, num_experts: int, num_groups: int, top_groups: int) -> None:
    """As on a CPU, row by row; ties are frequent, some rows are broken."""
    logits = router_logits(30, num_experts, seed=3)
    bias = torch.randint(-4, 4, (num_experts,)) / 8 if scoring == "sigmoid" else None
    rule = GroupedRouting(4, num_groups, top_groups, scoring, scoring == "sigmoid", 2.5)  # type: ignore[arg-type]
    experts, weights = moe_launch.run_route_grouped(logits, bias, rule)
    wanted = ReferenceOps(InstructionClass.FMA).moe_route_grouped(logits, bias, rule)
    assert torch.equal(experts, wanted.experts_TJ)
    assert torch.allclose(weights, wanted.weights_TJ, rtol=1e-5, atol=1e-10, equal_nan=True)


def test_digests_of_rows_on_the_device_equal_those_of_the_host() -> None:
    torch.manual_seed(4)
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_size=72, block_size=48, num_planes=1)
    kv = torch.randn((5, 2, 1, 1, 48, 72)).bfloat16()
    digester = KVDigester(kv, layout, first_layer=3)
    spans = [Span(3, 96, 0, 48), Span(1, 0, 5, 33)]
    host = digester._digester
    assert isinstance(host, digest._HostDigester)
    constants = {"A": digest._A, "B": digest._B, "C": digest._C, "M1": digest._M1, "M2": digest._M2}
    found = start_digests(
        kv.view(torch.int64), torch.from_numpy(host._key_W.view(np.int64)), torch.tensor(spans),
        first_layer=3, first_kv_head=0, constants=constants,
    )  # fmt: skip
    assert found.tolist() == digester.begin(spans).values().view(np.int64).tolist()


def test_impossible_calls_are_refused() -> None:
    cache = PagedLatent([20], num_heads=4, latent_size=32, rope_size=16, dtype=torch.float16, device="cpu")
    metadata, q, q_rope = cache.metadata([0], [1], [20]), cache.q[0][:1], cache.q_rope[0][:1]
    with pytest.raises(ValueError, match=r"queries of 32 \+ 8 do not fit cached rows of 48"):
        latent_launch.run_latent_attention(q, q_rope[:, :, :8], cache.layer, metadata, 0.1, LatentPlan(), 4)
    with pytest.raises(ValueError, match="scale must be positive"):
        latent_launch.run_latent_attention(q, q_rope, cache.layer, metadata, 0.0, LatentPlan(), 4)
    with pytest.raises(ValueError, match="do not fit weights"):
        latent_launch.run_head_linear(q, torch.zeros(4, 8, 16).half(), LinearPlan())
    with pytest.raises(ValueError, match="5 experts cannot be chosen of 2 groups of 2"):
        moe_launch.run_route_grouped(torch.zeros(1, 8), None, GroupedRouting(5, 4, 2, "softmax", False, 1.0))
