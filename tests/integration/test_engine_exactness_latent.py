"""The engine over tiny models with latent attention: tokens, logprob bits and cached rows whatever the batch, the
chunks, the cached prefix and the engine that computed the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.engine.kernels import get_ops
from cluster.engine.kernels.mutations import break_kernel
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.integration.test_engine_exactness import NUM_THREADS, Answer, Lab, pull, requests, run, steps
from tests.unit.model_factory import LATENT_FAMILIES, random_model, save_safetensors

BATCH = requests()[2::4]  # prompts of 16, 33 and 96 tokens
Run = tuple[dict[str, Answer], dict[str, str]]


@pytest.fixture(scope="module", params=LATENT_FAMILIES)
def model_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_safetensors(random_model(request.param), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lab(model_directory: Path) -> Lab:
    return Lab(model_directory, get_ops("cpu", NUM_THREADS))


def each_alone(lab: Lab) -> Run:
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in BATCH:
        one = run(lab.engine(DecodePolicy(), max_batched_tokens=256), [request])
        answers |= one[0]
        digests |= one[1]
    return answers, digests


@pytest.fixture(scope="module")
def reference(lab: Lab) -> Run:
    return each_alone(lab)


@pytest.mark.parametrize("max_batched_tokens", [16, 97])
def test_chunks_neighbours_and_cached_prefixes_do_not_change_bits(
    lab: Lab, reference: Run, max_batched_tokens: int
) -> None:
    engine = lab.engine(DecodePolicy(), num_blocks=200, max_batched_tokens=max_batched_tokens)
    engine.kv_cache.kv_NL2HSD.fill_(torch.nan)  # a stale page may hold anything
    assert run(engine, BATCH) == reference
    assert run(engine, BATCH) == reference  # now with what is left in the prefix cache
    assert engine.load().cached_tokens > 0


def test_prefill_and_decode_engine(lab: Lab, reference: Run) -> None:
    prefill = lab.engine(PrefillPolicy(), num_blocks=200, max_batched_tokens=37)
    decode = lab.engine(DecodePolicy(), num_blocks=200)
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    by_id = {request.request_id: request for request in BATCH}
    for request in BATCH:
        prefill.add_request(request)
    for finished in steps(prefill, answers, {}):
        pull(prefill, decode, finished, by_id[finished.chunk.request_id])
    assert not list(steps(decode, answers, digests))
    assert {key: answer[:2] for key, answer in answers.items()} == {
        key: answer[:2] for key, answer in reference[0].items()
    }
    assert digests == reference[1]


@pytest.mark.parametrize("mutant", ["latent", "head_linear"])
def test_a_kernel_whose_order_depends_on_the_batch_is_noticed(model_directory: Path, mutant: str) -> None:
    """Of these prompts the cache holds all but one row, which then is computed alone."""
    broken = Lab(model_directory, break_kernel(get_ops("cpu", NUM_THREADS), mutant))
    engine = broken.engine(DecodePolicy(), num_blocks=200)
    batch = [request for request in requests() if len(request.token_ids) in (17, 33, 65)]
    cold, warm = ([run(engine, [request]) for request in batch] for _ in range(2))
    assert engine.load().cached_tokens > 0
    assert cold != warm
