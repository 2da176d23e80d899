"""Drawing on the GPU, interpreted on the CPU: the tokens of the reference."""

from __future__ import annotations

import math

import torch

from cluster.engine.gpu.cuts import Cuts, has_filters
from cluster.engine.gpu.sampler import top_ids
from cluster.engine.kernels.triton.draw import draw_tokens, ranks
from cluster.engine.sampling import filters
from cluster.engine.sampling.draw import admission_cases, reference_draw
from cluster.types import SamplingParams


def draw(logits_V: torch.Tensor, sampling: SamplingParams, position: int) -> int:
    top_R = logits_V.max()[None]
    lowest_D = torch.tensor([-math.inf])
    if has_filters(sampling, len(logits_V)):
        scaled_FV = (logits_V[None] - top_R).mul_(filters.inverse_temperature(sampling))
        lowest_D = Cuts([sampling], len(logits_V), logits_V.device).lowest_values(scaled_FV)
    numbers_D2 = torch.stack([torch.tensor([filters.inverse_temperature(sampling)]), lowest_D], dim=1)
    tokens_R = torch.zeros(1, dtype=torch.int64)
    place, seed, at = torch.zeros(1, dtype=torch.int32), torch.tensor([sampling.seed]), torch.tensor([position])
    draw_tokens(logits_V[None], top_R, place, numbers_D2, seed, at.int(), tokens_R)
    return int(tokens_R[0])


def test_every_case_of_the_reference() -> None:
    for logits_V, sampling in admission_cases():
        for position in (1, 1000):
            expected = reference_draw(logits_V.clone(), float(logits_V.max()), sampling, position)
            assert draw(logits_V, sampling, position) == expected, sampling


def test_a_vocabulary_of_several_chunks_and_several_rows() -> None:
    logits_RV = torch.randn(3, 9001, generator=torch.Generator().manual_seed(1))
    sampling = SamplingParams(max_tokens=1, seed=(1 << 62) + 5, temperature=1.3)
    expected = [
        reference_draw(logits_RV[row].clone(), float(logits_RV[row].max()), sampling, 70 + row) for row in (2, 0)
    ]
    tokens_R = torch.full((3,), -1)
    numbers_D2 = torch.tensor([[filters.inverse_temperature(sampling), -math.inf]] * 2)
    rows_D, seeds_D = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([sampling.seed] * 2)
    positions_D = torch.tensor([72, 70], dtype=torch.int32)
    draw_tokens(logits_RV, logits_RV.max(1).values, rows_D, numbers_D2, seeds_D, positions_D, tokens_R)
    assert tokens_R.tolist() == [expected[1], -1, expected[0]]


def test_ranking_counts_ties_by_the_lower_id() -> None:
    logits_RV = torch.randn(2, 5000, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    logits_RV[0, 17], logits_RV[0, 18] = -0.0, 0.0
    order_RV = logits_RV.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(top_ids(logits_RV, 40), order_RV[:, :40])
    many_RV = logits_RV[:, :300].repeat(40, 1).roll(7, dims=0)
    assert torch.equal(top_ids(many_RV, 3), many_RV.sort(dim=1, descending=True, stable=True).indices[:, :3])
    tokens_R = torch.tensor([18, 4321])
    expected = [order_RV[row].tolist().index(token) + 1 for row, token in enumerate(tokens_R.tolist())]
    assert ranks(logits_RV, tokens_R).tolist() == expected
