"""Steps of a cohort on the GPU's runner: over block boundaries and changes of who runs, the plain runner's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.engine.batch import Batch
from cluster.engine.gpu.staging import StepStaging
from cluster.engine.gpu.step_words import StepWords
from cluster.engine.kernels import get_ops
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.types import Request
from tests.unit.engine_fakes import make_request, prompt_of
from tests.unit.model_factory import random_model, save_safetensors
from tests.unit.triton_interpret_runner_cases import answers, make_engine, use_gpu_runner

VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 7, "logprobs": 2},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.2, "seed": 1 << 40, "min_p": 0.05},
    {"temperature": 0.7, "seed": 3, "logit_bias": ((5, 4.0),)},
    {"temperature": 0.9, "seed": 5, "min_tokens": 8, "stop_token_ids": tuple(range(100)), "logprobs": 0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = save_safetensors(random_model("qwen3"), tmp_path_factory.mktemp("model"))
    return load_model(directory, get_ops("cpu", 1), SingleRank(), torch.device("cpu")).model


def requests(variants: list[dict[str, Any]]) -> list[Request]:
    """They end one after the other, and each crosses blocks of 16."""
    return [
        make_request(f"r{index}", prompt_of(6 + 2 * index, index), max_tokens=15 + 3 * index, ignore_eos=True, **each)
        for index, each in enumerate(variants)
    ]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("variants", [VARIANTS, VARIANTS[:1] * 5, [{"temperature": 0.9, "seed": 7}] * 5])
def test_the_tokens_of_the_plain_runner(model: Any, steps_ahead: int, variants: list[dict[str, Any]]) -> None:
    expected = answers(make_engine(model, 0), requests(variants))
    continued, moved_on = [], []
    stage, move_on = StepStaging.stage, StepWords.move_on

    def watched_stage(self: StepStaging, batch: Batch, *arguments: Any) -> Any:
        continued.append(batch.age > 0)
        return stage(self, batch, *arguments)

    def watched_move(self: StepWords, batch: Batch) -> None:
        moved_on.append(batch.step)
        move_on(self, batch)

    with mock.patch.object(StepStaging, "stage", watched_stage), mock.patch.object(StepWords, "move_on", watched_move):
        found = answers(use_gpu_runner(make_engine(model, steps_ahead), model), requests(variants))
    assert sum(continued) > 10
    assert len(moved_on) == (sum(continued) if steps_ahead else 0)
    for key, (tokens, logprobs, _) in expected.items():
        assert found[key][0] == tokens
        ours = [(each.token_id, each.rank, [token for token, _ in each.top]) for each in found[key][1]]
        assert ours == [(each.token_id, each.rank, [token for token, _ in each.top]) for each in logprobs]
