"""The GPU's runner over the CPU's kernels, its own kernels interpreted: the tokens of the plain runner.

What this covers without a GPU: staging, padding, tokens that stay on the device, sampling without
waiting, prompt logprobs in parts, running a step ahead. Graphs and speed are for tests/gpu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.gpu import runner as gpu_runner
from cluster.engine.gpu.draws import DrawRows
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.gpu.sampler import GpuSampler, RowStats, logprob_rows
from cluster.engine.kernels import get_ops
from cluster.engine.kernels.ops import TwoStepAttention
from cluster.engine.kernels.triton import launch
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.types import Request, TokenChunk
from decode.policy import DecodePolicy
from tests.unit.engine_fakes import make_request
from tests.unit.model_factory import random_model, save_safetensors

NUM_BLOCKS, BLOCK_SIZE, MAX_SEQUENCES, MAX_ROWS = 24, 16, 6, 40


class InterpretedOps(TwoStepAttention):
    """The CPU's operations, and the statistics of the logits from the GPU's kernel."""

    def __init__(self) -> None:
        self._cpu = get_ops("cpu", 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def vocab_stats(self, logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return launch.run_vocab_stats(logits_RV)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = save_safetensors(random_model("qwen3"), tmp_path_factory.mktemp("model"))
    return load_model(directory, get_ops("cpu", 1), SingleRank(), torch.device("cpu")).model


def make_engine(model: Any, steps_ahead: int) -> Engine:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=NUM_BLOCKS * model.kv_layout(BLOCK_SIZE).block_bytes,
        max_num_sequences=MAX_SEQUENCES,
        max_batched_tokens=MAX_ROWS,
        num_threads=1,
    )
    return Engine(model, config, get_ops("cpu", 1), DecodePolicy(), steps_ahead=steps_ahead)


def use_gpu_runner(engine: Engine, model: Any) -> Engine:
    engine._runner = GpuModelRunner(
        model,
        InterpretedOps(),  # type: ignore[arg-type]
        engine.kv_cache,
        device=torch.device("cpu"),
        max_batched_tokens=MAX_ROWS,
        max_num_sequences=MAX_SEQUENCES,
        max_model_len=engine.max_model_len,
        use_graphs=False,
    )
    return engine


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 0.8, "seed": 8, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.2, "seed": 1 << 40, "min_p": 0.05, "logprobs": 3},
        {"temperature": 0.0, "logprobs": 0, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 2},
        {"temperature": 0.7, "seed": 3, "logit_bias": ((5, 4.0),), "min_tokens": 4},
    ]
    made = []
    for index, length in enumerate((1, 15, 16, 17, 33, 47, 60)):
        tokens = tuple(torch.randint(3, 300, (length,), generator=generator).tolist())
        made.append(make_request(f"r{index}", tokens, max_tokens=9, ignore_eos=True, **variants[index]))
    return made


def answers(engine: Engine, batch: list[Request]) -> dict[str, tuple[list[int], list[Any], list[Any]]]:
    found: dict[str, tuple[list[int], list[Any], list[Any]]] = {}
    for request in batch:
        engine.add_request(request)
        found[request.request_id] = ([], [], [])
    for _ in range(400):
        if not engine.has_work():
            break
        for event in engine.step():
            assert isinstance(event, TokenChunk)
            tokens, logprobs, prompt = found[event.request_id]
            tokens.extend(event.token_ids)
            logprobs.extend(event.logprobs)
            prompt.extend(event.prompt_logprobs)
    assert not engine.has_work()
    engine.blocks.check_integrity()
    assert engine.blocks.num_free == NUM_BLOCKS
    return found


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("logit_rows", [3, 512])
def test_the_tokens_of_the_plain_runner(
    model: Any, steps_ahead: int, logit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "_LOGIT_ROWS_AT_ONCE", logit_rows)
    expected = answers(make_engine(model, 0), requests())
    found = answers(use_gpu_runner(make_engine(model, steps_ahead), model), requests())
    assert {key: tokens for key, (tokens, _, _) in found.items()} == {
        key: tokens for key, (tokens, _, _) in expected.items()
    }
    for key, (_, logprobs, prompt) in found.items():
        for ours, theirs in zip([*logprobs, *prompt], [*expected[key][1], *expected[key][2]], strict=True):
            if theirs is None:
                assert ours is None
                continue
            assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
            assert [each for each, _ in ours.top] == [each for each, _ in theirs.top]
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)  # another kernel's logsumexp


def test_the_largest_step_tells_logprobs_of_as_many_rows_as_any(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or their memory would be missed when a request wants them: a worker would end, and the next that tried again."""
    engine = use_gpu_runner(make_engine(model, 1), model)
    told: list[int] = []

    def noting(logits_RV: torch.Tensor, *more: Any, **named: Any) -> Any:
        told.append(len(logits_RV))
        return logprob_rows(logits_RV, *more, **named)

    monkeypatch.setattr(gpu_runner, "logprob_rows", noting)
    engine._runner.run_largest()  # type: ignore[attr-defined]
    assert told == [MAX_ROWS]


@pytest.mark.parametrize("length", [94, MAX_ROWS + 1, 2 * MAX_ROWS + 1])
def test_chunks_that_owe_prompt_logprobs_and_draw_nothing_or_have_one_row(model: Any, length: int) -> None:
    [request] = [each for each in requests() if each.sampling.prompt_logprobs is not None]
    longer = msgspec.structs.replace(request, token_ids=(request.token_ids * 3)[:length])
    assert len(longer.token_ids) == length > MAX_ROWS
    expected = answers(make_engine(model, 0), [longer])
    found = answers(use_gpu_runner(make_engine(model, 1), model), [longer])
    assert found[longer.request_id][0] == expected[longer.request_id][0]
    assert len(found[longer.request_id][2]) == len(longer.token_ids)


def stats_of(tokens: list[int], logsumexp: float = 1.0) -> RowStats:
    ids_R = torch.tensor(tokens)
    return RowStats(torch.zeros(len(tokens)), torch.full((len(tokens),), logsumexp), ids_R)


def plain_draws(model: Any, count: int) -> Any:
    """Greedy, without logprobs, of sequences that decode."""
    engine = make_engine(model, 0)
    for index in range(count):
        engine.add_request(make_request(f"r{index}", (3, 4, 5 + index), max_tokens=4, ignore_eos=True, temperature=0.0))
    batch = engine.scheduler.schedule()
    assert batch is not None
    draws = DrawRows().of(batch)
    assert len(draws) == count
    return draws


@pytest.mark.parametrize("num_buffers", [3, 9])
def test_what_a_step_told_stays_while_others_are_launched(model: Any, num_buffers: int) -> None:
    sampler, draws = GpuSampler(InterpretedOps(), 5, num_buffers), plain_draws(model, 3)  # type: ignore[arg-type]
    logits_RV, tokens_R = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    told = []
    turns = range(10, 10 + num_buffers)
    for turn in turns:
        told.append(sampler.sample(logits_RV, stats_of([turn, 131_071, 7]), draws, tokens_R))
        assert tokens_R.tolist() == [turn, 131_071, 7]
    assert [rows.token_ids() for rows in told] == [[turn, 131_071, 7] for turn in turns]


@pytest.mark.parametrize("logsumexp", [float("nan"), float("inf"), float("-inf")])
def test_rows_whose_logits_are_no_numbers_are_told_apart(model: Any, logsumexp: float) -> None:
    sampler, draws = GpuSampler(InterpretedOps(), 3, 3), plain_draws(model, 3)  # type: ignore[arg-type]
    stats = stats_of([1, 2, 3])
    stats.logsumexp_R[1] = logsumexp
    drawn = sampler.sample(torch.zeros(3, 8), stats, draws, torch.zeros(3, dtype=torch.int64))
    assert drawn.is_broken_R.tolist() == [False, True, False]
