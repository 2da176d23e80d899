"""The whole engine on a GPU: the same bits in every batch, chunking, cache state and topology; its limits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from benchmarks.gpu.exactness import REFERENCE, Cell, Exactness, compare, crowded_cells, make_requests, standard_cells
from benchmarks.gpu.random_model import LLAMA_8B, random_decoder
from cluster.engine.config import EngineConfig, SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.gpu import memory
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.models.config import NoScaling, WeightFormat
from cluster.errors import StartupError
from cluster.types import Request, SamplingParams, TokenChunk
from decode.policy import DecodePolicy

TINY = msgspec.structs.replace(
    LLAMA_8B, hidden_size=512, num_layers=3, num_heads=8, num_kv_heads=2, head_size=64, ffn_size=1408, vocab_size=3000,
    rope_scaling=NoScaling(), max_position=4096, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip
LIMITS: dict[str, Any] = {"max_num_sequences": 96, "max_batched_tokens": 2048, "kv_cache_bytes": 256 << 20}


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    return CudaOps(torch.device("cuda"))


@pytest.fixture(scope="module")
def model(ops: CudaOps) -> Any:
    return random_decoder(TINY, ops, std=0.06)


def test_the_same_bits_in_every_way_to_compute(model: Any, ops: CudaOps) -> None:
    lab = Exactness(model, ops, make_requests(90, TINY.vocab_size, 12), max_model_len=2048, **LIMITS)
    many = {"max_num_sequences": 256}
    cells = [
        *standard_cells((3, 17, 90), (64, 97, 512)),
        Cell("preempting", 90, {"kv_cache_bytes": 40 << 20}),
        *crowded_cells(72, (160, 256), many),  # the others have penalties and wait for their tokens every second step
    ]
    count, mismatches = compare(lab, cells)
    assert count == len(cells)
    assert mismatches == []


def test_the_same_bits_with_fp8_layers(ops: CudaOps) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FP8 is for Hopper")
    config = msgspec.structs.replace(TINY, weight_format=WeightFormat.FP8)
    lab = Exactness(
        random_decoder(config, ops, std=0.06), ops, make_requests(60, TINY.vocab_size, 12), max_model_len=2048, **LIMITS
    )
    count, mismatches = compare(lab, standard_cells((3, 60), (97,)))
    assert count == 10
    assert mismatches == []


def test_a_kernel_that_couples_rows_is_noticed(model: Any, ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Exactness(model, ops, make_requests(6, TINY.vocab_size, 6), max_model_len=2048, **LIMITS)
    expected = lab.run(REFERENCE)
    plain = ops.rms_norm

    def coupled(x_TK: torch.Tensor, weight_K: torch.Tensor, eps: float, **more: Any) -> torch.Tensor:
        return plain(x_TK + 1e-3 * x_TK.float().mean().to(x_TK.dtype), weight_K, eps, **more)

    monkeypatch.setattr(ops, "rms_norm", coupled)
    found = lab.run(Cell("coupled", 6, {"cuda_graphs": False}))
    assert any(found[key].differences(expected[key]) for key in expected)


def test_a_pool_that_does_not_fit_names_what_was_needed_and_what_was_there(model: Any, ops: CudaOps) -> None:
    _free, total = torch.cuda.mem_get_info()
    config = EngineConfig(device="cuda", kv_cache_bytes=total, max_model_len=2048, max_num_sequences=4)
    message = r"engine\.kv_cache_bytes: .* GiB do not fit on cuda.*: .* GiB are free .*; set at most \d+MiB"
    with pytest.raises(StartupError, match=message):
        Engine(model, config, ops, DecodePolicy())
    torch.cuda.empty_cache()
    small = msgspec.structs.replace(config, kv_cache_bytes=1 << 20)
    with pytest.raises(StartupError, match=r"one context of max_model_len 2048 tokens needs"):
        Engine(model, small, ops, DecodePolicy())
    with pytest.raises(StartupError, match=r"the weights need .* GiB on cuda, where .* GiB are free"):
        memory.check_weights_fit(torch.device("cuda"), total * 2)


@pytest.mark.parametrize("graph_prompt_rows", [0, 256])
def test_the_pool_leaves_room_for_steps(model: Any, ops: CudaOps, graph_prompt_rows: int) -> None:
    """Chosen from what is free, within the share that was asked for; with graphs of steps with prompts, too."""
    _free, total = torch.cuda.mem_get_info()
    config = EngineConfig(
        device="cuda", gpu_memory_fraction=0.3, max_model_len=2048, max_num_sequences=16,
        graph_prompt_rows=graph_prompt_rows,
    )  # fmt: skip
    engine = Engine(model, config, ops, DecodePolicy())
    pool = engine.num_blocks * engine.layout.block_bytes
    assert 0.2 * total < pool
    assert torch.cuda.memory_reserved() <= 0.3 * total + (64 << 20)


def test_nan_ends_its_request_alone(model: Any, ops: CudaOps) -> None:
    """Logits that are not numbers are an error of that request; its neighbours have the bits they have alone."""
    requests = make_requests(5, TINY.vocab_size, 6)
    lab = Exactness(model, ops, requests[1:], max_model_len=2048, **LIMITS)
    expected = lab.run(REFERENCE)
    bad_token = 3
    embedding = model.weights.embedding_VK
    kept = embedding[bad_token].clone()
    embedding[bad_token] = float("nan")
    try:
        config = EngineConfig(device="cuda", max_model_len=2048, **LIMITS)
        engine = Engine(model, config, ops, DecodePolicy())
        broken = msgspec.structs.replace(requests[0], token_ids=(bad_token, 5, 7))
        for request in (broken, *requests[1:]):
            engine.add_request(request)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        errors = {}
        while engine.has_work():
            for event in engine.step():
                assert isinstance(event, TokenChunk)
                tokens[event.request_id].extend(event.token_ids)
                if event.error is not None:
                    errors[event.request_id] = event.error.code
        assert list(errors) == [broken.request_id]
        for request in requests[1:]:
            if bad_token not in (*request.token_ids, *expected[request.request_id].tokens):
                assert tokens[request.request_id] == expected[request.request_id].tokens
        assert engine.blocks.num_free == engine.num_blocks
    finally:
        embedding[bad_token] = kept


@pytest.mark.parametrize("num_drafts", [3, 8])
def test_a_model_that_is_its_own_draft_guesses_right(model: Any, ops: CudaOps, num_drafts: int) -> None:
    """All passes of a proposal are launched before the first is read."""
    requests = make_requests(6, TINY.vocab_size, 24)
    drafting = SpeculationConfig(method="draft", num_tokens=num_drafts, draft_model="itself")
    answers = []
    for speculation in (SpeculationConfig(), drafting):
        config = EngineConfig(device="cuda", max_model_len=2048, speculation=speculation, **LIMITS)
        draft = model if speculation is drafting else None
        engine = Engine(model, config, ops, DecodePolicy(), draft_model=draft)
        answers.append(tokens_of(engine, requests))
    assert answers[0] == answers[1]
    load = engine.load()
    assert load.spec_accepted_tokens == load.spec_draft_tokens > 60


def test_no_launch_waits_for_the_device(model: Any, ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a request asks for."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0, "seed": 0},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "logprobs": 3},
        {"temperature": 0.0, "seed": 0, "logit_bias": ((5, 4.0), (9, -4.0)), "min_tokens": 6},
        {"temperature": 0.7, "seed": 6, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "seed": 0, "prompt_logprobs": 2},
    )
    requests = [
        msgspec.structs.replace(
            each, sampling=SamplingParams(max_tokens=10, ignore_eos="min_tokens" not in kind, **kind)
        )
        for each, kind in zip(make_requests(len(kinds), TINY.vocab_size, 10), kinds, strict=True)
    ]
    engine = Engine(model, EngineConfig(device="cuda", max_model_len=2048, **LIMITS), ops, DecodePolicy())
    expected = tokens_of(engine, requests)  # compiles what these requests need
    runner: Any = engine._runner
    plain = runner.launch

    def launch(batch: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner, "launch", launch)
    assert tokens_of(engine, requests) == expected


def test_the_same_bits_with_a_residual_stream_in_fp32() -> None:
    wide = CudaOps(torch.device("cuda"), residual_dtype=torch.float32)
    lab = Exactness(
        random_decoder(TINY, wide, std=0.06), wide, make_requests(60, TINY.vocab_size, 12), max_model_len=2048, **LIMITS
    )
    count, mismatches = compare(lab, standard_cells((3, 60), (97,)))
    assert count == 10
    assert mismatches == []


def tokens_of(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """All at once, to the end."""
    found: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        for event in engine.step():
            assert isinstance(event, TokenChunk)
            assert event.error is None
            found[event.request_id].extend(event.token_ids)
    assert engine.blocks.num_free == engine.num_blocks
    return found
