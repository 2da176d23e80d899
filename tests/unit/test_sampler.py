"""Sampling: distributions, filters and penalties by their definitions; bits that depend on the row only."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.batch import DrawnRow, SampledToken
from cluster.engine.kernels.cpu.arithmetic import InstructionClass
from cluster.engine.kernels.cpu.library import VARIANTS, open_library, supports
from cluster.engine.kernels.ops import Ops
from cluster.engine.sampling import elementary, filters, logprobs, noise
from cluster.engine.sampling.draw import choose_draw, equals_reference, reference_draw
from cluster.engine.sampling.native import functions_of
from cluster.engine.sampling.native_draw import NativeDraw
from cluster.engine.sampling.sampler import Sampler
from cluster.engine.sequence import Sequence, make_sequence
from cluster.types import SamplingParams
from tests.unit.engine_fakes import FakeOps, make_request

CPU = torch.device("cpu")
OPS = cast(Ops, FakeOps())


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "seed": 0, **fields})


def sequence_of(
    prompt: tuple[int, ...], output: tuple[int, ...] = (), eos: tuple[int, ...] = (), **fields: Any
) -> Sequence:
    request = make_request("r", prompt + output, num_prompt_tokens=len(prompt), **{"max_tokens": 100, **fields})
    return make_sequence(request, block_size=16, max_model_len=512, eos_token_ids=eos, is_loaded=False)


def sample(logits: torch.Tensor, *sequences: Sequence) -> list[SampledToken]:
    return Sampler(OPS, CPU).sample(logits, [DrawnRow(each, len(each.token_ids)) for each in sequences]).to_host()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---- random numbers


def test_philox_known_answers() -> None:
    """From the authors' test vectors (Random123, kat_vectors, philox4x32 10)."""
    ids = torch.arange(4)
    assert [hex(bits) for bits in noise.philox_bits([(0, 0)], ids)[0].tolist()] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip


def test_noise_is_a_function_of_seed_position_and_id_only() -> None:
    draws = [(5, 3), (5, 4), (1 << 62, 3)]
    whole = noise.philox_bits_of_all(draws, 1003, CPU)
    assert torch.equal(noise.philox_bits(draws, torch.arange(1003)), whole)
    assert torch.equal(noise.philox_bits(draws[1:], torch.tensor([7, 1002, 11])), whole[1:, [7, 1002, 11]])
    assert torch.equal(noise.philox_bits_of_all([draws[2]], 61, CPU)[0], whole[2, :61])
    assert len({tuple(row[:8].tolist()) for row in whole}) == 3


def test_gumbel_noise_has_the_right_moments_and_extremes_are_finite() -> None:
    values = noise.gumbel(noise.philox_bits_of_all([(seed, 9) for seed in range(8)], 20_000, CPU)).double()
    assert abs(float(values.mean()) - 0.577216) < 0.01
    assert abs(float(values.var()) - math.pi**2 / 6) < 0.03
    extremes = noise.gumbel(torch.tensor([0, 1, 1 << 31, (1 << 32) - 1]))
    assert extremes.isfinite().all()
    assert abs(float(extremes[0]) - math.log(2.0**33)) < 1e-5


@pytest.mark.parametrize("offset", range(0, 17, 3))
def test_elementary_functions_are_accurate_and_have_no_position(offset: int) -> None:
    x = normal(40_000, seed=1).abs() + 1e-30
    assert torch.allclose(elementary.log(x).double(), x.double().log(), rtol=3e-7, atol=1e-7)
    y = -normal(40_000, seed=2, scale=30.0).abs().clamp(max=80.0)
    assert torch.allclose(elementary.exp_of_nonpositive(y).double(), y.double().exp(), rtol=3e-7, atol=0.0)
    assert torch.equal(elementary.log(x[offset : offset + 1001]), elementary.log(x)[offset : offset + 1001])
    assert float(elementary.exp_of_nonpositive(torch.tensor([0.0]))) == 1.0


# ---- the draw


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    num_draws = 4000
    counts = Counter(choose_draw(CPU)(logits, 2.0, params(seed=seed, temperature=1.5), 7) for seed in range(num_draws))
    for token_id, probability in enumerate((logits / 1.5).softmax(0).tolist()):
        error = 4 * math.sqrt(probability * (1 - probability) / num_draws) + 1e-9
        assert abs(counts[token_id] / num_draws - probability) < error


@pytest.mark.parametrize("variant", [name for names in VARIANTS.values() for name in names if "fma" in name])
def test_every_native_variant_draws_what_the_reference_draws(variant: str) -> None:
    library = open_library()
    if library is None or not supports(library, variant):
        pytest.skip(f"this machine has no {variant}")
    native = NativeDraw(functions_of(library, variant))
    assert equals_reference(native)
    for index in range(12):
        logits = normal(49_152, seed=index, scale=(0.1, 1.0, 5.0)[index % 3])
        top = float(logits.max())
        for fields in ({}, {"top_p": 0.95}, {"top_k": 100, "top_p": 0.7}):
            sampling = params(seed=index << 33, temperature=0.9, **fields)
            assert native(logits, top, sampling, index) == reference_draw(logits, top, sampling, index)
    assert VARIANTS[InstructionClass.FMA]


def test_admission_refuses_a_draw_that_is_wrong_once() -> None:
    calls = iter(range(10_000))

    def wrong_once(logits_V: torch.Tensor, top: float, sampling: SamplingParams, position: int) -> int:
        token_id = reference_draw(logits_V, top, sampling, position)
        return token_id ^ 1 if next(calls) == 77 else token_id

    assert equals_reference(reference_draw)
    assert not equals_reference(wrong_once)


def brute_force_candidates(scaled: list[float], sampling: SamplingParams) -> set[int]:
    """Straight from the definitions, in float64 and with ties kept."""
    kept = set(range(len(scaled)))
    if sampling.min_p > 0.0:
        kept = {token_id for token_id in kept if scaled[token_id] >= np.float32(math.log(sampling.min_p))}
    if 0 < sampling.top_k < len(scaled):
        smallest = sorted(scaled, reverse=True)[sampling.top_k - 1]
        kept = {token_id for token_id in kept if scaled[token_id] >= smallest}
    if sampling.top_p < 1.0:
        total = sum(math.exp(scaled[token_id]) for token_id in kept)
        kept = {
            token_id
            for token_id in kept
            if sum(math.exp(scaled[other]) for other in kept if scaled[other] > scaled[token_id])
            < sampling.top_p * total
        }
    return kept


@given(
    values=st.lists(st.integers(-40, 0), min_size=1, max_size=30),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.93, 0.501, 0.0371]),
    min_p=st.sampled_from([0.0, 0.011, 0.31]),
)
@settings(max_examples=150, deadline=None)
def test_candidates_are_those_of_the_definition(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor(values, dtype=torch.float32) / 4.0
    sampling = params(top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = filters.scale(logits, float(logits.max()), sampling)
    found = filters.candidates(scaled, sampling)
    expected = brute_force_candidates(scaled.tolist(), sampling)
    assert (set(range(len(values))) if found is None else set(found.tolist())) == expected


def test_filters_keep_at_least_the_most_likely_token() -> None:
    logits = normal(100, scale=0.01)
    for fields in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        drawn = {reference_draw(logits, float(logits.max()), params(seed=seed, **fields), 0) for seed in range(20)}
        assert drawn == {int(logits.argmax())}


def test_a_temperature_near_zero_is_greedy_and_not_a_fault() -> None:
    logits = normal(1000, scale=20.0)
    for temperature in (1e-6, 1e-30, 5e-324):
        assert choose_draw(CPU)(logits, float(logits.max()), params(temperature=temperature), 3) == int(logits.argmax())


# ---- rows and batches


def mixed_sequences() -> list[Sequence]:
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 4},
        {"temperature": 1.0, "seed": 11, "logprobs": 2},
        {"temperature": 0.8, "seed": 12, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "seed": 13, "top_p": 0.95, "logprobs": 0},
        {"temperature": 1.0, "seed": 14, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logit_bias": ((7, 1.5),), "min_tokens": 50, "logprobs": 20},
    ]
    return [sequence_of(tuple(range(5 + index)), (3, 3, 9), (2,), **each) for index, each in enumerate(variants)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch_place_and_thread_count(num_threads: int) -> None:
    sequences = mixed_sequences()
    logits = normal(len(sequences), 5003, scale=3.0)
    alone = [sample(logits[row : row + 1].clone(), each)[0] for row, each in enumerate(sequences)]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for shift in range(len(sequences)):
            order = [(row + shift) % len(sequences) for row in range(len(sequences))]
            together = sample(logits[order], *(sequences[row] for row in order))
            assert together == [alone[row] for row in order]
    finally:
        torch.set_num_threads(threads)


def test_greedy_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(3, 40_000)
    logits[0, [39_999, 17, 20_000]] = 1.0
    logits[1, :] = -5.0
    assert [each.token_id for each in sample(logits, *[sequence_of((1,), temperature=0.0)] * 3)] == [17, 0, 0]


def test_nan_and_infinity_mark_their_row_only() -> None:
    logits = normal(5, 500)
    logits[1, 400] = math.nan
    logits[2, 3] = math.inf
    logits[3, :] = -math.inf
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_tokens": 9},
    ]
    for fields in variants:
        result = sample(logits, *(sequence_of((1,), logprobs=3, eos=(400,), **fields) for _ in range(5)))
        assert [each.is_nan for each in result] == [False, True, True, True, False]
        assert [each.logprob is None for each in result] == [False, True, True, True, False]


# ---- processors


def processed(logits: list[float], sequence: Sequence) -> list[float]:
    """What a greedy choice looks at."""
    sampler = Sampler(OPS, CPU)
    row = torch.tensor(logits)
    sampler._processor.apply(row, sequence, sequence.num_output_tokens)
    return row.tolist()


def test_penalties_by_their_definitions() -> None:
    prompt, output = (0, 1, 1), (2, 2, 1)
    logits = [1.0, 2.0, -3.0, 4.0]
    assert processed(logits, sequence_of(prompt, output, presence_penalty=0.5)) == [1.0, 1.5, -3.5, 4.0]
    assert processed(logits, sequence_of(prompt, output, frequency_penalty=0.5)) == [1.0, 1.5, -4.0, 4.0]
    assert processed(logits, sequence_of(prompt, output, repetition_penalty=2.0)) == [0.5, 1.0, -6.0, 4.0]


def test_a_history_follows_its_sequence_token_by_token() -> None:
    sampler = Sampler(OPS, CPU)
    sequence = sequence_of((1,), frequency_penalty=1.0)
    for expected in ([0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, -2.0], [-1.0, 0.0, -2.0]):
        row = torch.zeros(3)
        sampler._processor.apply(row, sequence, sequence.num_output_tokens)
        assert row.tolist() == expected
        sequence.token_ids.append(2 if sequence.num_output_tokens < 2 else 0)


def test_minimum_length_masks_stops_and_bias_is_added() -> None:
    fields: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (1,), "logit_bias": ((1, 5.0), (2, 5.0))}
    logits = [0.0] * 4
    assert processed(logits, sequence_of((0,), (3,), eos=(3,), **fields)) == [0.0, -math.inf, 5.0, -math.inf]
    assert processed(logits, sequence_of((0,), (3, 3), eos=(3,), **fields)) == [0.0, 5.0, 5.0, 0.0]
    ignoring = sequence_of((0,), (3,), eos=(3,), ignore_eos=True, **fields)
    assert processed(logits, ignoring) == [0.0, -math.inf, 5.0, 0.0]


# ---- logprobs


def test_logprobs_are_of_the_raw_logits_with_ranks_and_ties_by_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 2.0]])
    sequence = sequence_of((0,), temperature=0.0, logit_bias=((4, 10.0),), logprobs=3)
    (token,) = sample(logits, sequence)
    assert token.logprob is not None
    expected = logits[0].double().log_softmax(0)
    assert token.token_id == 4
    assert token.logprob.rank == 3
    assert [token_id for token_id, _ in token.logprob.top] == [1, 2, 4]
    assert token.logprob.logprob == pytest.approx(float(expected[4]), abs=1e-6)
    assert token.logprob.logprob == float(np.float32(token.logprob.logprob))


def test_the_top_of_many_ties_is_the_lowest_ids() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 2999] = 1.0
    (token,) = sample(logits, sequence_of((0,), temperature=0.0, logprobs=20))
    assert token.logprob is not None
    assert [token_id for token_id, _ in token.logprob.top] == [2999, *range(19)]


@pytest.mark.parametrize("vocab_size", [5, 64, 130, 5003])
def test_both_rankings_agree_also_on_ties(vocab_size: int) -> None:
    logits = (normal(6, vocab_size, seed=vocab_size) * 4).round() / 4
    logits[5] = 0.0
    token_ids = torch.arange(6) % vocab_size
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    for count in (0, 1, 5):
        everywhere = logprobs._ranking(logits, token_ids, chosen, count)
        on_cpu = logprobs._ranking_on_cpu(logits, token_ids, count)
        assert torch.equal(everywhere[0], on_cpu[0])
        assert torch.equal(everywhere[1], on_cpu[1])
