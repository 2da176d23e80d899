"""Speculation over a real (tiny, random) model and the CPU kernels: equal tokens, logprob bits and KV bytes.

{prompt lookup, draft model, an oracle that errs} x {greedy, sampled, top-p} x {alone, batch, chunks,
preemption, behind a prefill engine} x {0, 1 steps ahead}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.config import SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.events import PromptFinished
from cluster.engine.kernels import get_ops
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.types import Request, TokenChunk
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.integration.test_engine_exactness import (
    NUM_THREADS,
    Answer,
    Lab,
    kv_of,
    pull,
    take,
)
from tests.unit.engine_fakes import Outcome, make_request
from tests.unit.model_factory import random_model, save_safetensors
from tests.unit.speculation_fakes import Oracle, speculate_with

LENGTHS = (1, 15, 16, 17, 33, 64, 65, 100)
MAX_TOKENS = 48
MOST_STEPS = 1000  # a broken engine may go on for ever
STORED_TOKENS = 32  # of the output, whose KV is compared
NGRAM = SpeculationConfig(method="ngram", num_tokens=6, ngram_min=2)
DRAFT = SpeculationConfig(method="draft", num_tokens=5, draft_model="given to the engine")
METHODS = ("ngram", "draft", "oracle")
Runs = tuple[dict[str, Answer], dict[str, str]]


class SpeculatingLab(Lab):
    """With a draft model: the target, its weights blurred."""

    def __init__(self, directory: Path, draft_directory: Path) -> None:
        super().__init__(directory, get_ops("cpu", NUM_THREADS))
        self.draft_model = load_model(draft_directory, self.ops, SingleRank(), torch.device("cpu")).model


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SpeculatingLab:
    target, draft = random_model("qwen3"), random_model("qwen3")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.0 + 0.1 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    return SpeculatingLab(
        save_safetensors(target, tmp_path_factory.mktemp("model")),
        save_safetensors(draft, tmp_path_factory.mktemp("draft")),
    )


def requests() -> list[Request]:
    """Greedy texts of a random model fall into loops now and then; at low temperature, too."""
    generator = torch.Generator().manual_seed(3)
    variants: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 0.25, "logprobs": 0},
        {"temperature": 0.3, "top_p": 0.8, "top_k": 40, "logprobs": 3},
        {"temperature": 1.0, "repetition_penalty": 1.2, "logprobs": 1},
    ]
    return [
        make_request(
            f"r{index}",
            tuple(torch.randint(3, 320, (length,), generator=generator).tolist()),
            max_tokens=MAX_TOKENS,
            seed=index,
            ignore_eos=True,
            **variants[index % len(variants)],
        )
        for index, length in enumerate(LENGTHS)
    ]


def run(engine: Engine, batch: list[Request]) -> Runs:
    """Digests are of the KV of each prompt and its first STORED_TOKENS tokens, as soon as that is complete."""
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in batch:
        engine.add_request(request)
    for _ in range(MOST_STEPS):
        for event in engine.step() if engine.has_work() else ():
            assert isinstance(event, TokenChunk)
            take(answers, event)
        engine.blocks.check_integrity()
        for sequence in engine.scheduler.running:
            num_tokens = sequence.prompt_length + STORED_TOKENS
            if sequence.num_computed_tokens >= num_tokens:
                digests.setdefault(sequence.request.request_id, kv_of(engine, sequence, num_tokens))
    assert not engine.has_work()
    assert engine.blocks.num_free == engine.num_blocks
    return answers, digests


@pytest.fixture(scope="module")
def reference(lab: SpeculatingLab) -> Runs:
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in requests():
        one = run(lab.engine(DecodePolicy(), max_batched_tokens=256), [request])
        answers |= one[0]
        digests |= one[1]
    assert len(digests) == len(LENGTHS)
    return answers, digests


def speculating(lab: SpeculatingLab, method: str, reference: Runs, **options: Any) -> Engine:
    if method == "ngram":
        return lab.engine(DecodePolicy(), speculation=NGRAM, **options)
    if method == "draft":
        return lab.engine(DecodePolicy(), speculation=DRAFT, draft_model=lab.draft_model, **options)
    engine = lab.engine(DecodePolicy(), **options)
    answers = {key: Outcome(answer[0]) for key, answer in reference[0].items()}
    speculate_with(engine, Oracle(requests(), answers, lambda position, place: (3 * position + place) % 5 > 0))
    return engine


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("max_batched_tokens", "num_blocks"), [(37, 200), (97, 17)], ids=["chunks", "preempting"])
def test_the_same_bits_with_and_without(
    lab: SpeculatingLab, reference: Runs, method: str, max_batched_tokens: int, num_blocks: int, steps_ahead: int
) -> None:
    engine = speculating(
        lab,
        method,
        reference,
        num_blocks=num_blocks,
        max_batched_tokens=max_batched_tokens,
        steps_ahead=steps_ahead,
    )
    assert run(engine, requests()) == reference
    load = engine.load()
    assert 0 < load.spec_accepted_tokens < load.spec_draft_tokens
    assert (load.preemptions > 0) == (num_blocks == 17)


@pytest.mark.parametrize("method", METHODS)
def test_on_what_speculation_has_left_in_the_prefix_cache(lab: SpeculatingLab, reference: Runs, method: str) -> None:
    engine = speculating(lab, method, reference, num_blocks=200)
    for _ in range(2):
        assert run(engine, requests()) == reference
    assert engine.load().cached_tokens > 0


@pytest.mark.parametrize("method", METHODS)
def test_one_at_a_time(lab: SpeculatingLab, reference: Runs, method: str) -> None:
    engine = speculating(lab, method, reference, num_blocks=64)
    for request in requests():
        answers, digests = run(engine, [request])
        assert answers == {request.request_id: reference[0][request.request_id]}
        assert digests == {request.request_id: reference[1][request.request_id]}


@pytest.mark.parametrize("method", METHODS)
def test_behind_a_prefill_engine(lab: SpeculatingLab, reference: Runs, method: str) -> None:
    prefill = lab.engine(PrefillPolicy(), num_blocks=200)
    decode = speculating(lab, method, reference, num_blocks=200)
    answers: dict[str, Answer] = {}
    for request in requests():
        prefill.add_request(request)
        while prefill.has_work():
            for event in prefill.step():
                if isinstance(event, PromptFinished):
                    take(answers, event.chunk)
                    pull(prefill, decode, event, request)
    while decode.has_work():
        for event in decode.step():
            assert isinstance(event, TokenChunk)
            take(answers, event)
    assert answers == reference[0]
    assert 0 < decode.load().spec_accepted_tokens < decode.load().spec_draft_tokens


def test_stale_pages_do_not_matter(lab: SpeculatingLab, reference: Runs) -> None:
    """A pool full of NaN: rows of drafts read nothing that was not written."""
    engine = speculating(lab, "oracle", reference, num_blocks=200)
    engine.kv_cache.kv_NL2HSD.fill_(torch.nan)
    assert run(engine, requests()) == reference
