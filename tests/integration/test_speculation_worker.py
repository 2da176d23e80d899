"""Speculation in a worker: configured, loaded, refused by name, and the same answers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from cluster import LLM, EngineConfig, SamplingParams
from cluster.control.process import load_worker
from cluster.control.worker_config import WorkerConfig
from cluster.engine.config import SpeculationConfig
from cluster.errors import ConfigError, ModelError
from decode.worker import DecodeParts
from prefill.worker import PrefillParts
from tests.unit.model_factory import random_model, save_safetensors, tiny_tokenizer

ENGINE = EngineConfig(block_size=16, num_threads=1, max_batched_tokens=64, kv_cache_bytes=4 << 20)
PROMPTS = [[1, 50 + salt, *range(60, 60 + 7 * salt), 9, 9, 9, 9] for salt in range(1, 6)]


def save(model: PreTrainedModel, directory: Path) -> Path:
    """With a tokenizer: one token per byte."""
    tiny_tokenizer(model.config.vocab_size).save(str(directory / "tokenizer.json"))
    return save_safetensors(model, directory)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, a little blurred: a good guesser, but not the target."""
    model = random_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.02 * torch.randn_like(parameter))
    return save(model, tmp_path_factory.mktemp("draft"))


def speculating(method: str, draft: Path) -> EngineConfig:
    path = str(draft) if method == "draft" else None
    speculation = SpeculationConfig(method=method, draft_model=path, num_tokens=4)  # type: ignore[arg-type]
    return msgspec.structs.replace(ENGINE, speculation=speculation)


@pytest.mark.parametrize("method", ["ngram", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_answers_as_without(target: Path, draft: Path, method: str, temperature: float) -> None:
    sampling = SamplingParams(max_tokens=60, seed=5, temperature=temperature, logprobs=2, ignore_eos=True)
    with LLM(str(target), engine=ENGINE) as llm:
        expected = llm.generate(PROMPTS, sampling)
    with LLM(str(target), engine=speculating(method, draft)) as llm:
        assert llm.generate(PROMPTS, sampling) == expected
        load = llm._driver.engine.load()
        assert load.num_free_blocks == load.num_blocks
    if method == "draft" or temperature == 0.0:
        assert 0 < load.spec_accepted_tokens < load.spec_draft_tokens
    if method == "draft":
        assert load.spec_accepted_tokens > 0.6 * load.spec_draft_tokens, "the same noise: it seldom differs"


def test_a_draft_model_of_another_vocabulary_is_refused(target: Path, tmp_path: Path) -> None:
    other = save(random_model("llama", vocab_size=352), tmp_path)
    config = WorkerConfig(model=str(target), engine=speculating("draft", other), transport="loopback")
    with pytest.raises(
        ModelError, match=r"draft_model: token 320 is '<unused61>' in .* and None in target0; .* vocabulary"
    ):
        load_worker(config, DecodeParts())


def test_a_draft_model_that_is_not_there_is_named(target: Path, tmp_path: Path) -> None:
    config = WorkerConfig(model=str(target), engine=speculating("draft", tmp_path / "nothing"), transport="loopback")
    with pytest.raises(ModelError, match=r"nothing"):
        load_worker(config, DecodeParts())


def test_a_prefill_worker_refuses_to_speculate(target: Path, draft: Path) -> None:
    config = WorkerConfig(model=str(target), engine=speculating("ngram", draft), transport="loopback")
    with pytest.raises(ConfigError, match=r"engine\.speculation\.method is ngram: a prefill worker"):
        load_worker(config, PrefillParts())
