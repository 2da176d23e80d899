"""Steps with prompts as graphs, over the CPU's kernels and the GPU's attention, interpreted: the tokens of eager steps.

A fake graph runs again what was captured, for the shape it was captured for, on the tensors that are staged.
What a real graph freezes beside that, its kernels and their grids, depends on nothing else.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.engine.engine import Engine
from cluster.engine.gpu import prompt_shapes, staging, step_words
from cluster.engine.gpu import runner as gpu_runner
from cluster.engine.gpu.graphs import StepOutput
from cluster.engine.gpu.prompt_shapes import PromptShapes
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.gpu.shapes import MANY_ROWS, StepShape, padded_sizes
from cluster.engine.gpu.staging import StagedStep
from cluster.engine.kernels import get_ops
from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention_launch
from cluster.engine.kernels.triton.plans import AttentionPlan
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.types import Request
from tests.gpu.support import Paged
from tests.unit.engine_fakes import make_request
from tests.unit.model_factory import random_model, save_safetensors
from tests.unit.triton_interpret_runner_cases import MAX_ROWS, MAX_SEQUENCES, InterpretedOps, answers, make_engine

SPLIT = 64  # keys: so that short contexts have several splits
PLAN = AttentionPlan(prefill_block_rows=16, split_block_rows=16)  # tiles of few rows: many that are not full


class AttendingOps(InterpretedOps):
    """With the GPU's attention, which is interpreted in float32."""

    def attention(
        self, q_THD: torch.Tensor, kv_N2GSD: torch.Tensor, metadata: AttentionMetadata, scale: float, **more: Any
    ) -> torch.Tensor:
        out = attention_launch.run_attention(q_THD.float(), kv_N2GSD.float(), metadata, scale, PLAN, 2, **more)
        return out.to(q_THD.dtype)


class FakeGraphs:
    """A `GraphStore` that runs again what was captured."""

    def __init__(self, pool: object) -> None:
        self.captured: dict[StepShape, Callable[[], Any]] = {}

    def __len__(self) -> int:
        return len(self.captured)

    def capture(self, shape: StepShape, forward: Callable[[], Any]) -> None:
        forward()
        self.captured[shape] = forward

    def replay(self, shape: StepShape) -> Any:
        forward = self.captured.get(shape)
        return None if forward is None else forward()


def use_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "GraphStore", FakeGraphs)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = save_safetensors(random_model("qwen3"), tmp_path_factory.mktemp("model"))
    loaded = load_model(directory, get_ops("cpu", 1), SingleRank(), torch.device("cpu")).model
    loaded.ops = AttendingOps()
    return loaded


def shorten_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_launch, staging, step_words, gpu_runner):
        monkeypatch.setattr(module, "SPLIT_KEYS", SPLIT)


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_splits(monkeypatch)


def runner_engine(model: Any, graph_prompt_rows: int = 0) -> tuple[Engine, GpuModelRunner]:
    engine = make_engine(model, 1)
    runner = engine._runner = GpuModelRunner(
        model,
        AttendingOps(),  # type: ignore[arg-type]
        engine.kv_cache,
        device=torch.device("cpu"),
        max_batched_tokens=MAX_ROWS,
        max_num_sequences=MAX_SEQUENCES,
        max_model_len=engine.max_model_len,
        use_graphs=graph_prompt_rows > 0,
        graph_prompt_rows=graph_prompt_rows,
    )
    runner.capture_prompts()
    return engine, runner


def graph_engine(model: Any, monkeypatch: pytest.MonkeyPatch, graph_prompt_rows: int) -> tuple[Engine, GpuModelRunner]:
    use_fake_graphs(monkeypatch)
    return runner_engine(model, graph_prompt_rows)


def requests() -> list[Request]:
    """Prompts of a row, of a tile and a row, of several chunks and splits; drawn greedily and with noise; one wants
    its logprobs."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for index, length in enumerate((70, 1, 9, 9, 10, 9, 3)):
        tokens = tuple(torch.randint(3, 300, (length,), generator=generator).tolist())
        sampling: dict[str, Any] = {"temperature": 0.8, "seed": index} if index % 3 == 2 else {"temperature": 0.0}
        if index == 4:
            sampling["prompt_logprobs"] = 0
        made.append(make_request(f"r{index}", tokens, max_tokens=3 - index % 2, ignore_eos=True, **sampling))
    return made


def tokens_of(found: dict[str, tuple[list[int], list[Any], list[Any]]]) -> dict[str, list[int]]:
    return {key: tokens for key, (tokens, _, _) in found.items()}


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, list[int]]:
    """Of the same runner without graphs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten_splits(monkeypatch)
        return tokens_of(answers(runner_engine(model)[0], requests()))


def test_graphs_give_the_tokens_of_eager_steps(
    model: Any, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_shapes, "FEW_SEQUENCES", 2)
    engine, runner = graph_engine(model, monkeypatch, MAX_ROWS)
    with_logprobs: list[StepShape] = []
    plain = runner._forward_with_prompts

    def noting(staged: StagedStep, *more: Any) -> StepOutput:
        with_logprobs.append(staged.shape)
        return plain(staged, *more)

    monkeypatch.setattr(runner, "_forward_with_prompts", noting)
    assert tokens_of(answers(engine, requests())) == expected
    assert [shape.num_prompts_max for shape in with_logprobs] == [None], "what is eager anyway has the shape it had"
    assert runner.prompt_graphs is not None
    assert runner.prompt_graphs.costs is not None
    assert runner.prompt_graphs.costs.count == 6, "16, 32 and 40 rows of up to 2 and of all sequences"
    assert runner.prompt_graphs.num_replays >= 3


def test_larger_steps_stay_eager(model: Any, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = graph_engine(model, monkeypatch, MAX_ROWS - 1)
    shapes: list[StepShape] = []
    plain = runner._forward_eagerly

    def noting(shape: StepShape, longest: int, num_keys: int) -> StepOutput:
        shapes.append(shape)
        return plain(shape, longest, num_keys)

    monkeypatch.setattr(runner, "_forward_eagerly", noting)
    assert tokens_of(answers(engine, requests())) == expected
    assert runner.prompt_graphs is not None
    assert runner.prompt_graphs.num_replays >= 1
    mixed = [shape for shape in shapes if shape.num_rows_max > 1]
    assert mixed
    assert {(shape.num_rows, shape.num_prompts_max) for shape in mixed} == {(MAX_ROWS, None)}


def test_a_step_of_more_prompts_than_a_graph_has_tiles_for_stays_eager(
    model: Any, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_shapes, "MOST_PROMPTS", 1)
    engine, runner = graph_engine(model, monkeypatch, MAX_ROWS)
    assert tokens_of(answers(engine, requests())) == expected
    assert runner.prompt_graphs is not None
    assert runner.prompt_graphs.num_replays >= 1


def test_a_grid_without_room_for_tiles_that_are_not_full_is_noticed(
    model: Any, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AttentionMetadata.num_tiles

    def too_few(self: AttentionMetadata, num_rows: int, rows_per_tile: int, max_rows: int) -> int:
        return plain(self, num_rows, rows_per_tile, max_rows) - (self.num_prompts_max or 0)

    monkeypatch.setattr(AttentionMetadata, "num_tiles", too_few)
    engine, _ = graph_engine(model, monkeypatch, MAX_ROWS)
    assert tokens_of(answers(engine, requests())) != expected


def test_inputs_staged_inside_of_a_graph_are_noticed(
    model: Any, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GpuModelRunner._hidden_rows

    def staging_too(self: GpuModelRunner, shape: StepShape) -> Any:
        self._stage_padding()
        return plain(self, shape)

    monkeypatch.setattr(GpuModelRunner, "_hidden_rows", staging_too)
    engine, _ = graph_engine(model, monkeypatch, MAX_ROWS)
    assert tokens_of(answers(engine, requests())) != expected


# ---- attention alone


def compositions(count: int) -> Iterator[list[int]]:
    """Rows of each of five sequences: single rows, prompts that fill tiles, prompts that do not."""
    source = random.Random(7)
    for _ in range(count):
        yield [source.choice((1, 1, 2, 8, 9, 15, 16, 17)) for _ in range(5)]


def attend(cache: Paged, rows: list[int], shape: StepShape | None, plan: AttentionPlan = PLAN) -> torch.Tensor:
    """(T, H * D) of the newest rows of each sequence; `shape`: with the padding and the bounds of a graph."""
    num_rows = sum(rows)
    num_sequences = len(rows) if shape is None else shape.num_sequences
    total = num_rows if shape is None else shape.num_rows
    starts = [0, *itertools.accumulate(rows)]
    starts += [num_rows] * (num_sequences + 1 - len(starts))
    contexts = [*cache.contexts, *[1] * (num_sequences - len(rows))]
    table = torch.zeros((num_sequences, cache.table.shape[1]), dtype=torch.int32)
    table[: len(rows)] = cache.table
    q = torch.full((total, *cache.q[0].shape[1:]), torch.nan, dtype=torch.float16)
    q[:num_rows] = torch.cat([cache.q[index][-count:] for index, count in enumerate(rows)])
    metadata = AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.full((total,), -1),
        positions=torch.zeros(total, dtype=torch.int64),
        num_rows_max=MANY_ROWS,
        context_len_max=max(contexts) if shape is None else 256,
        num_keys_max=None if shape is None else 256 * num_sequences,
        num_prompts_max=None if shape is None else shape.num_prompts_max,
    )
    return attention_launch.run_attention(q, cache.layer, metadata, 0.2, plan, 3)[:num_rows]


def test_attention_with_the_bounds_of_a_graph_has_the_bits_of_attention_without() -> None:
    cache = Paged([200, 64, 30, 65, 17], num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    for rows in compositions(4):
        num_prompts = sum(count > 1 for count in rows)
        shape = StepShape(96, 8, 0, MANY_ROWS, True, num_prompts_max=max(1, num_prompts))
        assert torch.equal(attend(cache, rows, shape), attend(cache, rows, None)), rows


def test_single_rows_have_tiles_in_a_graph_where_no_split_kernel_serves() -> None:
    """As the reference's plan has it, which serves where split plans are refused: more tiles than prompts."""
    cache = Paged([40] * 12, num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    rows = [1] * 11 + [9]
    shape = StepShape(20, 12, 0, MANY_ROWS, True, num_prompts_max=1)
    tiled = msgspec.structs.replace(PLAN, few_rows_kind="tiled")
    assert torch.equal(attend(cache, rows, shape, tiled), attend(cache, rows, None))


def test_a_bound_of_one_prompt_too_few_is_noticed() -> None:
    cache = Paged([200, 64, 30, 65, 17], num_heads=4, num_kv_heads=2, head_size=16, dtype=torch.float16, device="cpu")
    rows = [9, 9, 9, 9, 9]  # tiles of 8 rows: two each, of which one has one row
    for bound, is_equal in ((5, True), (4, False)):
        shape = StepShape(45, 5, 0, MANY_ROWS, True, num_prompts_max=bound)
        assert torch.equal(attend(cache, rows, shape), attend(cache, rows, None)) is is_equal


# ---- shapes


def test_every_step_finds_a_captured_shape_that_holds_it_or_none() -> None:
    row_sizes, sequence_sizes = tuple(sorted({*padded_sizes(8192), *padded_sizes(300)})), padded_sizes(300)
    shapes = PromptShapes(1500, row_sizes, sequence_sizes, has_many_splits=True)
    captured = list(shapes)
    assert len(captured) == len(set(captured)) == 54
    assert captured == sorted(captured, key=lambda shape: (-shape.num_rows, -shape.num_sequences))
    source = random.Random(1)
    for _ in range(3000):
        num_sequences = source.choice((1, 2, 31, 32, 33, source.randint(1, 300)))
        rows = [1] * num_sequences
        for index in source.sample(range(num_sequences), source.randint(1, min(num_sequences, 40))):
            rows[index] = source.choice((2, 3, 31, 32, 33, source.randint(2, 500)))
        num_prompts = sum(count > 1 for count in rows)
        found = shapes.of(sum(rows), num_sequences, num_prompts, num_logits=num_sequences)
        if sum(rows) > 1500 or num_prompts > prompt_shapes.MOST_PROMPTS:
            assert found is None
            continue
        assert found is not None
        assert found.num_logits >= num_sequences
        assert found.num_rows >= sum(rows)
        assert found.num_sequences >= num_sequences
        assert any(
            (shape.num_rows, shape.num_sequences, shape.num_prompts_max)
            == (found.num_rows, found.num_sequences, found.num_prompts_max)
            for shape in captured
        )
        empty = torch.empty(found.num_sequences)
        metadata = AttentionMetadata(
            empty, empty, empty, empty, empty, MANY_ROWS, 8192, num_prompts_max=found.num_prompts_max
        )
        for rows_per_tile in (1, 8, 32, 128):
            tiles = sum(-(-count // rows_per_tile) for count in rows if count > 1)
            assert tiles <= metadata.num_tiles(found.num_rows, rows_per_tile)


def test_no_graphs_unless_they_are_asked_for(model: Any) -> None:
    _, runner = runner_engine(model)
    assert runner.prompt_graphs is None
    assert runner._staging.prompt_shapes is None
