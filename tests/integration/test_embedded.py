"""`from cluster import LLM`: the bits of a served worker, errors that are named, everything freed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster import LLM, EngineConfig, SamplingParams
from cluster.errors import InvalidRequest, TandemError
from cluster.model_files.source import resolve_model
from cluster.types import Role
from tests.integration.worker_processes import alone, connected, make_request, start
from tests.unit.model_factory import random_model, save_safetensors, tiny_tokenizer

ENGINE = EngineConfig(block_size=16, num_threads=1, max_batched_tokens=64, kv_cache_bytes=48 << 20, max_model_len=1024)
LENGTHS = (1, 16, 33, 96)


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve_model("demo").path


async def test_the_bits_of_a_served_worker(demo: Path, tmp_path: Path) -> None:
    requests = [make_request(f"r{length}", length, temperature=0.8, seed=7) for length in LENGTHS]
    key_file = tmp_path / "key"
    key_file.write_text("k" * 32)
    worker = await start(Role.DECODE, demo, key_file, engine={"kv_cache_bytes": 48 << 20, "max_model_len": 1024})
    try:
        connection = await connected(worker)
        served = [await alone(connection, request) for request in requests]
        await connection.close()
    finally:
        assert await worker.stop() == 0
    with LLM(str(demo), engine=ENGINE) as llm:
        completions = llm.generate([request.token_ids for request in requests], requests[0].sampling)
        manager = llm._driver.engine.load()
        assert manager.num_free_blocks == manager.num_blocks
    assert [list(completion.token_ids) for completion in completions] == [answer.tokens for answer in served]
    assert [list(completion.logprobs) for completion in completions] == [answer.logprobs for answer in served]
    assert all(len(completion.token_ids) == 12 for completion in completions)


def test_an_fp8_model_has_the_same_bits_alone_and_among_others(tmp_path: Path) -> None:
    """Prompts of several chunks and blocks; the model is tiny because FP8 on a CPU is emulated."""
    path = save_safetensors(random_model("llama"), tmp_path)
    tiny_tokenizer(320).save(str(path / "tokenizer.json"))
    prompts = [[(7 * i + length) % 300 + 3 for i in range(length)] for length in (1, 17, 40, 90)]
    sampling = SamplingParams(max_tokens=8, seed=5, temperature=0.9, ignore_eos=True, logprobs=2)
    engine = EngineConfig(
        block_size=16, num_threads=1, max_batched_tokens=32, max_num_sequences=4, kv_cache_bytes=4 << 20
    )
    with LLM(str(path), engine=engine, quantization="fp8") as llm:
        together = llm.generate(prompts, sampling)
        assert [llm.generate([prompt], sampling)[0] for prompt in prompts] == together
    with LLM(str(path), engine=engine) as llm:
        assert llm.generate(prompts, sampling) != together


def test_a_model_with_windows_has_the_same_bits_alone_and_among_others(tmp_path: Path) -> None:
    """Prompts of several windows, chunks and blocks, one with a cached prefix; one layer has a window, one has none."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    path = save_safetensors(random_model("qwen2", **window), tmp_path)
    tiny_tokenizer(320).save(str(path / "tokenizer.json"))
    prompts = [[(7 * i + length) % 300 + 3 for i in range(length)] for length in (1, 17, 40, 90)]
    prompts.append(prompts[-1][:64] + [5] * 30)
    sampling = SamplingParams(max_tokens=40, seed=5, temperature=0.9, ignore_eos=True, logprobs=2)
    results = []
    for max_batched_tokens in (32, 200):
        engine = EngineConfig(
            block_size=16, num_threads=1, max_batched_tokens=max_batched_tokens, max_num_sequences=4,
            kv_cache_bytes=4 << 20,
        )  # fmt: skip
        with LLM(str(path), engine=engine) as llm:
            results.append(llm.generate(prompts, sampling))
            results.append([llm.generate([prompt], sampling)[0] for prompt in prompts])
    bits = [[(each.token_ids, each.logprobs) for each in completions] for completions in results]
    assert all(each == bits[0] for each in bits)


def test_text_errors_and_close(demo: Path) -> None:
    with LLM(str(demo), engine=ENGINE) as llm:
        greedy = SamplingParams(max_tokens=6, seed=0, temperature=0.0)
        [completion] = llm.generate(["The capital of France is"], greedy)
        assert "Paris" in completion.text
        stop_at = completion.token_ids[2]
        stopped = msgspec.structs.replace(greedy, stop_token_ids=(stop_at,))
        [shorter] = llm.generate(["The capital of France is"], stopped)
        first = completion.token_ids.index(stop_at)
        assert shorter.token_ids == completion.token_ids[: first + 1]
        assert completion.text.startswith(shorter.text)
        assert shorter.text == llm._tokenizer.decode(shorter.token_ids[:-1]), "as over HTTP: without what stopped it"
        with pytest.raises(InvalidRequest, match="temperature"):
            llm.generate(["x"], SamplingParams(max_tokens=1, seed=0, temperature=-1.0))
        with pytest.raises(ValueError, match="stop"):
            llm.generate(["x"], SamplingParams(max_tokens=1, seed=0, stop=("a",)))
        wrong: list[tuple[Any, Any, str]] = [
            ("x", greedy, "prompts: a list"),  # which would be prompts of one letter
            ([5, 6], greedy, "prompts: a list"),
            (["x"], [greedy], "sampling: one SamplingParams"),
        ]
        for prompts, sampling, said in wrong:
            with pytest.raises(TypeError, match=said):
                llm.generate(prompts, sampling)
        with pytest.raises(TandemError):
            llm.generate([[1] * 100_000, [1, 2]], greedy)
        assert llm.generate(["The capital of France is"], greedy) == [completion], "an error leaves nothing behind"
    with pytest.raises(ValueError, match="closed"):
        llm.generate(["x"], greedy)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import cluster, sys; assert 'torch' not in sys.modules; cluster.LLM; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
