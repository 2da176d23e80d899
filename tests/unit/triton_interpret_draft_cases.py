"""Drafts with the GPU's runner, its own kernels interpreted: a draft model there guesses what one on a CPU guesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.config import EngineConfig, SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.gpu import start
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.kernels import get_ops
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.types import TokenChunk
from decode.policy import DecodePolicy
from tests.unit.engine_fakes import make_request
from tests.unit.model_factory import random_model, save_safetensors
from tests.unit.triton_interpret_graph_cases import use_fake_graphs
from tests.unit.triton_interpret_runner_cases import BLOCK_SIZE, MAX_ROWS, MAX_SEQUENCES, NUM_BLOCKS, InterpretedOps


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_safetensors(random_model("qwen3"), tmp_path_factory.mktemp("model"))


def load(directory: Path) -> Any:
    return load_model(directory, get_ops("cpu", 1), SingleRank(), torch.device("cpu")).model


def config_of(model: Any, num_drafts: int, **limits: int) -> EngineConfig:
    return EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=2 * NUM_BLOCKS * model.kv_layout(BLOCK_SIZE).block_bytes,
        max_num_sequences=limits.get("max_num_sequences", MAX_SEQUENCES),
        max_batched_tokens=limits.get("max_batched_tokens", MAX_ROWS),
        num_threads=1,
        speculation=SpeculationConfig(method="draft", num_tokens=num_drafts, draft_model="itself"),
    )


def answer(model: Any, draft: Any, num_drafts: int, *, on_gpu: bool) -> tuple[list[int], int, int]:
    """Tokens of one request, how many were guessed and how many of these accepted. The target is its own draft."""
    config = config_of(model, num_drafts)
    engine = Engine(model, config, get_ops("cpu", 1), DecodePolicy(), draft_model=draft, steps_ahead=1)
    if on_gpu:
        proposer: Any = engine.scheduler.speculator.proposer  # type: ignore[union-attr]
        proposer._runner = start.make_draft_runner(
            draft, InterpretedOps(), proposer._runner._kv_cache, config, engine.max_model_len  # type: ignore[arg-type]
        )  # fmt: skip
    engine.add_request(
        make_request("r", tuple(range(5, 25)), max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    )  # fmt: skip
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step():
            assert isinstance(event, TokenChunk)
            tokens.extend(event.token_ids)
    load = engine.load()
    return tokens, load.spec_draft_tokens, load.spec_accepted_tokens


@pytest.mark.parametrize("num_drafts", [2, 8])
def test_every_guess_of_the_same_model_comes_true(
    directory: Path, num_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes are all launched before the first is read: what each told must still be there."""
    use_fake_graphs(monkeypatch)
    model, draft = load(directory), load(directory)
    tokens, num_drafted, num_accepted = answer(model, draft, num_drafts, on_gpu=True)
    assert (tokens, num_drafted, num_accepted) == answer(model, draft, num_drafts, on_gpu=False)
    assert num_accepted == num_drafted > 20


@pytest.mark.parametrize(
    ("num_drafts", "max_rows", "max_sequences", "counts"),
    [(8, 64, 64, {1, 2, 4, 8}), (64, 512, 64, {1, 2, 4, 8}), (8, 16, 16, {1, 2, 4, 8}), (4, 64, 3, {1, 2})],
)
def test_steps_with_drafts_have_graphs_up_to_the_largest_step(
    directory: Path, num_drafts: int, max_rows: int, max_sequences: int, counts: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Few sequences with all their drafts may be more rows than a step may have."""
    use_fake_graphs(monkeypatch)
    model = load(directory)
    config = config_of(model, num_drafts, max_batched_tokens=max_rows, max_num_sequences=max_sequences)
    engine = Engine(model, config, get_ops("cpu", 1), DecodePolicy(), draft_model=model)
    runner = GpuModelRunner(
        model,
        InterpretedOps(),  # type: ignore[arg-type]
        engine.kv_cache,
        device=torch.device("cpu"),
        max_batched_tokens=max_rows,
        max_num_sequences=max_sequences,
        max_model_len=engine.max_model_len,
        max_drafts=num_drafts,
    )
    drafting = [shape for shape in runner._graph_shapes(False) if shape.num_rows_max > 1]
    assert {shape.num_sequences for shape in drafting} == counts
    for count in counts:
        most = max(shape.num_rows for shape in drafting if shape.num_sequences == count)
        assert min(count * (1 + num_drafts), max_rows) <= most <= max_rows
