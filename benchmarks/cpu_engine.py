"""How fast is the engine on this CPU, side by side with transformers on the same weights and dtype?

Rounds of both alternate, so that a busy machine slows both; the medians' ratio is the result.

    python -m benchmarks.cpu_engine [--model demo] [--rounds N] [--dry-run]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig, PreTrainedModel

from benchmarks.accounting import worker_addresses
from benchmarks.deployment import Deployment, deployment
from benchmarks.results import append_result
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.kernels import get_ops
from cluster.engine.kv_cache import KVLayout
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.model_files.source import resolve_model
from cluster.rpc.admin import inspect
from cluster.types import Request, SamplingParams
from decode.policy import DecodePolicy

PREFILL_TOKENS = 512
DECODE_PROMPT_TOKENS = 64
DECODE_TOKENS = 48
BATCH = 16
TTFT_REQUESTS = 15
SETTLE_S = 0.05  # between rounds: OpenMP's threads spin for some time after torch's last parallel region
POOL_BYTES = 512 << 20
VOCABULARY = 40_000  # prompts are drawn from the ids below it: ordinary tokens


def main() -> None:
    arguments = _parse_arguments()
    record = _Recorder(arguments.model, is_dry=arguments.dry_run)
    _measure_engine(arguments.model, arguments.rounds, record)
    _measure_deployments(arguments.model, record)


def _measure_engine(model: str, rounds: int, record: _Recorder) -> None:
    reference = _reference_model(model)
    engine = _engine(model)

    ours, theirs = _alternate(
        rounds, lambda: _prefill_s(engine, PREFILL_TOKENS), lambda: _reference_prefill_s(reference)
    )
    params = {"tokens": PREFILL_TOKENS, "ours_ms": ours * 1e3, "theirs_ms": theirs * 1e3}
    record("prefill_ratio_vs_transformers", theirs / ours, params)

    ours, theirs = _alternate(rounds, lambda: _decode_step_s(engine, 1), lambda: _reference_decode_step_s(reference))
    record("decode_ratio_vs_transformers", theirs / ours, {"ours_ms": ours * 1e3, "theirs_ms": theirs * 1e3})

    single, batched = _alternate(rounds, lambda: _decode_step_s(engine, 1), lambda: _decode_step_s(engine, BATCH))
    params = {"batch": BATCH, "single_step_ms": single * 1e3, "batch_step_ms": batched * 1e3}
    record("batch16_scaling", BATCH * single / batched, params)


class _Recorder:
    def __init__(self, model: str, *, is_dry: bool) -> None:
        self._model = model
        self._is_dry = is_dry

    def __call__(self, metric: str, value: float, params: dict[str, float]) -> None:
        rounded = {name: round(number, 4) for name, number in params.items()}
        print(f"{metric:32} {value:8.3f} x   {rounded}", flush=True)
        if not self._is_dry:
            append_result("cpu_engine", metric, round(value, 4), "x", {"model": self._model, **rounded})


def _alternate(rounds: int, first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Medians of both, measured in turn after one round of each that is thrown away."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for run, measured in zip((first, second), times, strict=True):
            torch.set_num_threads(1)  # as in a worker, whose kernels bring their own threads
            time.sleep(SETTLE_S)
            measured.append(run())
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


# ---- the engine, in this process


def _engine(model: str) -> Engine:
    ops = get_ops("cpu", None)
    loaded = load_model(model, ops, SingleRank(), torch.device("cpu"))
    config = EngineConfig(kv_cache_bytes=POOL_BYTES, max_batched_tokens=PREFILL_TOKENS, enable_prefix_caching=False)
    return Engine(loaded.model, config, ops, DecodePolicy())


def _add(engine: Engine, name: str, num_prompt_tokens: int, max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(hash(name) & 0xFFFF)
    token_ids = torch.randint(100, VOCABULARY, (num_prompt_tokens,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
    engine.add_request(Request(request_id=name, token_ids=tuple(token_ids), sampling=sampling))


def _prefill_s(engine: Engine, num_tokens: int) -> float:
    _add(engine, "prefill", num_tokens, 1)
    return _seconds(lambda: _drain(engine))


def _decode_step_s(engine: Engine, batch: int) -> float:
    """Mean seconds of a decode step of `batch` sequences."""
    for index in range(batch):
        _add(engine, f"decode-{index}", DECODE_PROMPT_TOKENS, DECODE_TOKENS)
    num_tokens = 0
    while num_tokens < batch:  # prompts first
        num_tokens += len(engine.step())
    num_steps = 8
    elapsed = _seconds(lambda: [engine.step() for _ in range(num_steps)])
    _drain(engine)
    return elapsed / num_steps


def _drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


# ---- transformers, in this process


def _reference_model(model: str) -> PreTrainedModel:
    """In bf16 with plain weights, as ours: transformers can also compute on packed GGUF weights, which is
    slower than either."""
    path = resolve_model(model).path
    if path.is_dir():
        return _in_bf16(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))
    unpacked = GgufConfig(gguf_file=path.name, dequantize=True)
    location = {"gguf_file": path.name, "quantization_config": unpacked}
    return _in_bf16(AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **location))


def _in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return model.eval()


@torch.inference_mode()
def _reference_prefill_s(model: PreTrainedModel) -> float:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    token_ids = torch.randint(100, VOCABULARY, (1, PREFILL_TOKENS))
    return _seconds(lambda: model(token_ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax())


@torch.inference_mode()
def _reference_decode_step_s(model: PreTrainedModel) -> float:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cache = DynamicCache()
    token = torch.randint(100, VOCABULARY, (1, DECODE_PROMPT_TOKENS))
    token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    num_steps = 8

    def steps() -> None:
        nonlocal token
        for _ in range(num_steps):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return _seconds(steps) / num_steps


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---- whole deployments


def _measure_deployments(model: str, record: _Recorder) -> None:
    """Time to first token of split and monolithic, both running, requests in turn; memory of the workers.
    Everything is as `cluster launch` sets it up by default."""
    with (
        deployment(model, ["monolithic=true"]) as monolithic,
        deployment(model, []) as split,
        httpx.Client(timeout=60.0) as client,
    ):
        generator = torch.Generator().manual_seed(1)
        times: dict[str, list[float]] = {monolithic.url: [], split.url: []}
        for _ in range(TTFT_REQUESTS + 1):
            prompt = torch.randint(100, VOCABULARY, (PREFILL_TOKENS,), generator=generator).tolist()
            for url, measured in times.items():
                time.sleep(SETTLE_S)
                measured.append(_time_to_first_token_s(client, url, prompt))
        ttft = {url: statistics.median(measured[1:]) for url, measured in times.items()}
        params = {"tokens": PREFILL_TOKENS, "split_ms": ttft[split.url] * 1e3, "mono_ms": ttft[monolithic.url] * 1e3}
        record("split_ttft_ratio", ttft[split.url] / ttft[monolithic.url], params)
        _record_memory(model, split, record)


def _record_memory(model: str, split: Deployment, record: _Recorder) -> None:
    """Peak resident memory of a worker of each role against what it is there for."""
    reference = _reference_model(model)
    weights = sum(2 * parameter.numel() for parameter in reference.parameters())
    layout = KVLayout(
        num_layers=reference.config.num_hidden_layers,
        num_kv_heads=reference.config.num_key_value_heads,
        head_size=reference.config.head_dim,
        block_size=EngineConfig().limits.block_size,
    )
    peaks = _worker_peaks(split)
    for name, address in worker_addresses(split).items():
        role = name.partition("-")[0]
        pool = asyncio.run(inspect(address)).num_blocks * layout.block_bytes
        params = {
            "is_prefill": float(role == "prefill"),
            "peak_mib": peaks[role] / 2**20,
            "weights_mib": weights / 2**20,
            "pool_mib": pool / 2**20,
        }
        record("memory_ratio", peaks[role] / (weights + pool), params)


def _time_to_first_token_s(client: httpx.Client, url: str, prompt: list[int]) -> float:
    """Until the first event; the stream is then read to its end, so that the next request finds it idle."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    body["model"] = client.get(f"{url}/v1/models").json()["data"][0]["id"]
    first: float | None = None
    start = time.perf_counter()
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if first is None and line.startswith("data:"):
                first = time.perf_counter() - start
    assert first is not None
    return first


def _worker_peaks(split: Deployment) -> dict[str, int]:
    """Peak resident bytes of one worker of each role."""
    peaks: dict[str, int] = {}
    for pid, command in split.worker_pids().items():
        for role in ("prefill", "decode"):
            if f"-m {role}" in command:
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        peaks[role] = int(line.split()[1]) * 1024
    assert set(peaks) == {"prefill", "decode"}, split.worker_pids()
    return peaks


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="print only, write no result lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
