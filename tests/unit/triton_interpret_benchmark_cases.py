"""What the GPU benchmarks do to an engine, over the CPU's kernels: the GPU's runner, its own kernels interpreted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from benchmarks.gpu.engine_profile import StepLog
from benchmarks.gpu.random_model import LLAMA_8B, random_decoder
from cluster.engine.engine import Engine
from cluster.engine.models.config import NoScaling
from tests.unit.triton_interpret_runner_cases import InterpretedOps, answers, make_engine, requests, use_gpu_runner

TINY = msgspec.structs.replace(
    LLAMA_8B, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, ffn_size=192, vocab_size=320,
    rope_scaling=NoScaling(), max_position=256, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> Any:
    return InterpretedOps()


@pytest.fixture(scope="module")
def model(ops: Any) -> Any:
    return random_decoder(TINY, ops, std=0.06)


def engine_of(model: Any) -> Engine:
    return use_gpu_runner(make_engine(model, 1), model)


def test_a_log_of_steps_changes_no_tokens_and_misses_no_step(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = answers(engine_of(model), requests())
    engine = engine_of(model)
    with StepLog(engine) as log:
        assert answers(engine, requests()) == expected
    numbers = [record.batch.step for record in log.records]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(period > 0 for period in log.periods_s)
    assert sum(log.periods_s) <= log.ended_at - log.started_at
    assert {record.band.split(",")[0] for record in log.records} == {"decode", "mixed"}
    log.print_classes()
    log.print_steps(range(2))
    printed = capsys.readouterr().out
    assert all(record.band in printed for record in log.records)
    num_records = len(log.records)
    again = [msgspec.structs.replace(request, request_id=f"again {request.request_id}") for request in requests()]
    answers(engine, again)
    assert len(log.records) == num_records, "the log has let go of the engine"
