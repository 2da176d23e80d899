"""What the GPU benchmarks do to an engine, over the CPU's kernels: the GPU's runner, its own kernels interpreted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from benchmarks.gpu import engine as engine_bench
from benchmarks.gpu import exactness, host_launch, prompt_graphs
from benchmarks.gpu.engine import EngineBench, Mixed, Workload
from benchmarks.gpu.exactness import REFERENCE, Cell, Exactness, compare, crowded_cells, make_requests
from benchmarks.gpu.random_model import LLAMA_8B, LLAMA_8B_FP8, random_decoder
from benchmarks.gpu.step_log import StepLog, StepRecord
from cluster.engine.engine import Engine
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.gpu.shapes import MANY_ROWS, StepShape
from cluster.engine.models.config import ModelConfig, NoScaling
from decode.policy import DecodePolicy
from tests.unit.triton_interpret_graph_cases import use_fake_graphs
from tests.unit.triton_interpret_runner_cases import InterpretedOps, answers, make_engine, requests, use_gpu_runner


def tiny(shape: ModelConfig) -> ModelConfig:
    return msgspec.structs.replace(
        shape, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, ffn_size=192, vocab_size=320,
        rope_scaling=NoScaling(), max_position=256, bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> Any:
    return InterpretedOps()


@pytest.fixture(scope="module")
def model(ops: Any) -> Any:
    return random_decoder(tiny(LLAMA_8B), ops, std=0.06)


def engine_of(model: Any) -> Engine:
    return use_gpu_runner(make_engine(model, 1), model)


def test_a_log_of_steps_changes_no_tokens_and_misses_no_step(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = answers(engine_of(model), requests())
    engine = engine_of(model)
    with StepLog(engine) as log:
        assert answers(engine, requests()) == expected
    numbers = [record.step for record in log.records]
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


def decode_step(number: int, done_at: float, wait_s: float, count: int, *, is_decode: bool = True) -> StepRecord:
    return StepRecord(number, count, count, 10 * count, is_decode, 0.0, wait_s=wait_s, done_at=done_at)


def test_the_host_fraction_is_that_of_decode_steps_behind_others(model: Any) -> None:
    """A slow mixed step, a smaller cohort and the first step of a cohort change nothing."""
    log = StepLog(engine_of(model))
    log.records = [
        decode_step(1, 40.0, 0.0, 4, is_decode=False),
        decode_step(2, 50.0, 9.0, 4),
        decode_step(3, 60.0, 8.0, 4),
        decode_step(4, 70.0, 9.0, 4),
        decode_step(5, 110.0, 1.0, 4, is_decode=False),
        decode_step(6, 120.0, 0.0, 4),
        decode_step(7, 130.0, 0.0, 3),
        decode_step(8, 140.0, 0.0, 3),
    ]
    assert log.host_fraction(4) == pytest.approx(1.0 - 17.0 / 20.0)
    assert log.host_fraction(3) == 1.0
    with pytest.raises(ValueError, match="no decode step of 5 sequences"):
        log.host_fraction(5)


def test_the_host_fraction_of_an_engine(model: Any) -> None:
    """On a CPU a step is done when its launch returns: nothing is waited for."""
    engine = engine_of(model)
    with StepLog(engine, has_events=False) as log:
        answers(engine, [msgspec.structs.replace(each, sampling=requests()[0].sampling) for each in requests()[:4]])
    assert 0.9 < log.host_fraction(4) <= 1.0


class InterpretedExactness(Exactness):
    """With the GPU's runner over the CPU's kernels in each engine."""

    def _engine(self, policy: Any, cell: Cell) -> Engine:
        engine = super()._engine(policy, cell)
        limits, speculation = engine.config.limits, engine.config.speculation
        engine._runner = GpuModelRunner(
            self._model,
            self._ops,
            engine.kv_cache,
            device=torch.device("cpu"),
            max_batched_tokens=limits.max_batched_tokens,
            max_num_sequences=limits.max_num_sequences,
            max_model_len=engine.max_model_len,
            max_drafts=speculation.num_tokens if speculation.method != "none" else 0,
            use_graphs=bool(engine.config.graph_prompt_rows or (cell.num_neighbours and engine.config.cuda_graphs)),
            graph_prompt_rows=engine.config.graph_prompt_rows or 0,
        )
        engine._runner.capture_prompts()
        if engine._runner._graphs is not None and cell.num_neighbours:
            engine._runner._capture(engine._runner._graphs)
        return engine


LIMITS: dict[str, Any] = {"max_num_sequences": 8, "max_batched_tokens": 128, "kv_cache_bytes": 1 << 20}


def laboratory(model: Any, ops: Any) -> Exactness:
    return InterpretedExactness(model, ops, make_requests(6, 320, 6), max_model_len=128, **LIMITS)


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_8B_FP8], ids=["bf16", "fp8"])
def test_the_cells_of_exactness_are_equal(shape: ModelConfig, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(exactness, "NEIGHBOUR_TOKENS", 12)
    cells = [
        Cell("prompts in graphs, split", 6, {"graph_prompt_rows": 128}, is_split=True),
        Cell("prompts in graphs, chunks", 6, {"max_batched_tokens": 40, "graph_prompt_rows": 40}, is_warm=True),
        Cell("batch", 6, {}),
        Cell("chunks", 6, {"max_batched_tokens": 13}),
        Cell("split, warm", 6, {}, is_warm=True, is_split=True),
        Cell("prompt lookup", 6, {"speculation": {"method": "ngram", "ngram_min": 1}}),
        *crowded_cells(6, (11,), {"max_num_sequences": 16}),
    ]
    count, mismatches = compare(laboratory(random_decoder(tiny(shape), ops, std=0.06), ops), cells)
    assert (count, mismatches) == (8, [])


def test_a_crowd_that_is_never_together_is_refused(model: Any, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "NEIGHBOUR_TOKENS", 12)
    with pytest.raises(AssertionError, match="at most 8 rows were drawn together"):
        laboratory(model, ops).run(Cell("too many", 6, {"cuda_graphs": False}, num_neighbours=5))
    use_fake_graphs(monkeypatch)
    monkeypatch.setattr(GpuModelRunner, "_capture", lambda runner, graphs: None)
    with pytest.raises(AssertionError, match="at most 0 rows were drawn together"):
        laboratory(model, ops).run(Cell("no graphs", 6, {"max_num_sequences": 16}, num_neighbours=5))


def test_other_weights_are_a_mismatch(model: Any, ops: Any) -> None:
    """An FP8 model answers otherwise than the bf16 model that it was made of."""
    expected = laboratory(model, ops).run(REFERENCE)
    found = laboratory(random_decoder(tiny(LLAMA_8B_FP8), ops, std=0.06), ops).run(REFERENCE)
    assert all({"logits", "kv"} <= set(found[key].differences(expected[key])) for key in expected)


def test_no_cell_is_begun_after_the_deadline(model: Any, ops: Any) -> None:
    assert compare(laboratory(model, ops), [Cell("batch", 6, {})], deadline_s=0.0) == (0, [])


def test_a_cell_of_graphs_that_replays_none_is_refused(model: Any, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_graphs(monkeypatch)
    with pytest.raises(AssertionError, match="no step with prompts was a graph"):
        laboratory(model, ops).run(Cell("too small", 6, {"graph_prompt_rows": 1}))


def test_graphs_of_steps_with_prompts_on_and_off(
    model: Any, ops: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed of each value, and that the steps that were graphs are told apart."""
    use_fake_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(engine_bench, "_LAST_TOKEN", 300)
    monkeypatch.setattr(prompt_graphs, "SHORT_PROMPTS", (9, 30))
    prompts = [tuple(range(3, 3 + length)) for length in (5, 9, 60, 1, 17, 33)]
    workload = Workload(prompts, [4] * len(prompts))
    monkeypatch.setattr(prompt_graphs, "mixed_workload", lambda count: workload)
    monkeypatch.setattr(EngineBench, "mixed", lambda bench, count, rounds: Mixed(bench.run(*workload), 125, 24))
    lab = laboratory(model, ops)

    def make(graph_prompt_rows: int) -> EngineBench:
        bench = object.__new__(EngineBench)
        bench.engine = lab._engine(DecodePolicy(), Cell("", 6, {"graph_prompt_rows": graph_prompt_rows}))
        bench._number = 0
        return bench

    off, on = prompt_graphs.compare_prompt_graphs(make, (0, 128), 6)
    assert off.costs is None
    assert off.mixed.num_graphs == 0 < off.mixed.count
    assert on.costs is not None
    assert on.mixed.num_graphs == on.mixed.count == off.mixed.count
    assert 0 < on.mixed.launch_ms <= on.mixed.host_ms <= on.mixed.step_ms * 1.5
    printed = capsys.readouterr().out
    assert "mixed graph, to 128 rows" in printed
    assert f"graph_prompt_rows 128: ready after {on.start_s:.1f} s; graphs: {on.costs.count} in " in printed
    assert f"graph_prompt_rows 128 : 0 = {on.tokens_per_s / off.tokens_per_s:.3f} of the tokens/s" in printed
    assert "first token of prompts of 9: " in printed


def test_the_launches_of_a_step_are_timed_by_operation(
    model: Any, ops: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = laboratory(model, ops)._engine(DecodePolicy(), Cell("", 6, {}))
    runner = engine._runner
    assert isinstance(runner, GpuModelRunner)
    host_launch.print_step(runner, ops, StepShape(16, 4, 1, MANY_ROWS, False), 2, lambda: None)
    printed = capsys.readouterr().out
    assert "16 rows of 4 sequences" in printed
    counts = {line.split()[0]: float(line.split()[3]) for line in printed.splitlines() if " us, " in line}
    assert counts == {
        "linear": 3.0, "linear_silu_mul": 1.0, "add_rms_norm": 2.0, "rope_attention": 1.0, "embedding": 0.5,
        "rms_norm": 0.5,
    }  # fmt: skip
    assert not [name for name in vars(ops) if name in counts], "the operations are the plain ones again"
