"""The whole engine on an 8B-shaped Llama, measured as the peer's script measures vLLM: same prompts, same formulas.

prefill  16 x 2048 tokens, one token out: the best of some rounds; single prompts the same way
decode   (256 tokens out - 1 token out) / 255, best of each
mixed    requests of 64-2048 prompt and 64-512 output tokens, all at once
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from benchmarks.gpu.random_model import LLAMA_8B, random_decoder
from benchmarks.gpu.step_log import StepLog
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.ops import LinearWeight
from cluster.engine.kv_cache import KVCache
from cluster.engine.models.config import ModelConfig
from cluster.engine.models.feed_forward import DenseFeedForward
from cluster.engine.models.llama import DecoderModel
from cluster.types import Request, SamplingParams, TokenChunk
from decode.policy import DecodePolicy

_FIRST_TOKEN, _LAST_TOKEN = 3, LLAMA_8B.vocab_size - 300
MIXED_SEED = 4242


@dataclass(frozen=True)
class Mixed:
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds


class Workload(NamedTuple):
    """Prompts, and how many tokens each is answered with."""

    prompts: list[tuple[int, ...]]
    num_tokens: list[int]


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(length))


def mixed_workload(count: int) -> Workload:
    """The peer's: 64-2048 prompt tokens and 64-512 output tokens each."""
    source = random.Random(MIXED_SEED)
    shape = [(source.randrange(64, 2049), source.randrange(64, 513)) for _ in range(count)]
    prompts = [random_prompt(length, 20000 + i) for i, (length, _) in enumerate(shape)]
    return Workload(prompts, [out for _, out in shape])


class EngineBench:
    """One engine; requests are given to it as an embedding program would."""

    def __init__(self, model: DecoderModel, ops: CudaOps, **config: object) -> None:
        settings = msgspec.convert(
            {"device": "cuda", "max_model_len": 8192, "enable_prefix_caching": False, **config}, EngineConfig
        )
        self.weight_bytes = sum(weight.num_bytes for weight in _linear_weights(model))
        self.engine = Engine(model, settings, ops, DecodePolicy())
        self._number = 0

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: Sequence[int], **sampling: object) -> float:
        """Seconds until all are complete."""
        requests = self._requests(prompts, num_tokens, **sampling)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for request in requests:
            self.engine.add_request(request)
        received = 0
        while self.engine.has_work():
            for event in self.engine.step():
                assert isinstance(event, TokenChunk)
                received += len(event.token_ids)
        seconds = time.perf_counter() - start
        assert received == sum(num_tokens)
        return seconds

    def add(self, workload: Workload) -> list[str]:
        """Give the engine greedy requests and leave the steps to the caller; their ids."""
        requests = self._requests(workload.prompts, workload.num_tokens)
        for request in requests:
            self.engine.add_request(request)
        return [request.request_id for request in requests]

    def _requests(
        self, prompts: Sequence[Sequence[int]], num_tokens: Sequence[int], **sampling: object
    ) -> list[Request]:
        requests = []
        for prompt, count in zip(prompts, num_tokens, strict=True):
            self._number += 1
            params = SamplingParams(max_tokens=count, seed=0, temperature=0.0, ignore_eos=True)
            params = msgspec.structs.replace(params, **sampling)
            requests.append(Request(request_id=f"b{self._number}", token_ids=tuple(prompt), sampling=params))
        return requests

    def prefill_tokens_per_s(self, count: int = 16, length: int = 2048, rounds: int = 3) -> float:
        prompts = [random_prompt(length, 1000 + i) for i in range(count)]
        self.run(prompts, [1] * count)
        return count * length / min(self.run(prompts, [1] * count) for _ in range(rounds))

    def decode_ms(self, batch: int, prompt: int = 128, out: int = 256, rounds: int = 3, **sampling: object) -> float:
        prompts = [random_prompt(prompt, 5000 + i) for i in range(batch)]
        self.run(prompts, [min(out, 32)] * batch, **sampling)
        one = min(self.run(prompts, [1] * batch, **sampling) for _ in range(rounds))
        full = min(self.run(prompts, [out] * batch, **sampling) for _ in range(rounds))
        return 1e3 * (full - one) / (out - 1)

    def prefill_ms(self, length: int, rounds: int = 5) -> float:
        """From a request of one token, on an idle engine, to that token."""
        prompts = [[random_prompt(length, 9000 + i)] for i in range(rounds + 1)]
        return 1e3 * min([self.run(prompt, [1]) for prompt in prompts][1:])

    def host_fraction(self, batch: int, prompt: int = 128, out: int = 128) -> float:
        """Share of a decode step in which the host does not wait for the device."""
        prompts = [random_prompt(prompt, 7000 + i) for i in range(batch)]
        self.run(prompts, [out] * batch)
        with StepLog(self.engine, has_events=False) as log:
            self.run(prompts, [out] * batch)
        return log.host_fraction(batch)

    def mixed(self, count: int, rounds: int = 2, *, at_once: int | None = None) -> Mixed:
        """All requests are there from the beginning; `at_once`: as many run together, instead of the engine's most."""
        workload = mixed_workload(count)
        scheduler = self.engine.scheduler
        most, scheduler.max_num_sequences = scheduler.max_num_sequences, at_once or scheduler.max_num_sequences
        try:
            seconds = min(self.run(*workload) for _ in range(rounds))
        finally:
            scheduler.max_num_sequences = most
        return Mixed(seconds, sum(map(len, workload.prompts)), sum(workload.num_tokens))


def _linear_weights(model: DecoderModel) -> Iterator[LinearWeight]:
    """What every step reads: all but the embedding, of which it reads a row per token."""
    for layer in model.weights.layers:
        assert isinstance(layer.feed_forward, DenseFeedForward)
        yield from (layer.qkv, layer.output, layer.feed_forward.gate_up, layer.feed_forward.down)
    yield model.weights.lm_head


def make_bench(
    shape: ModelConfig = LLAMA_8B,
    *,
    pdl: bool = True,
    residual_dtype: torch.dtype = torch.bfloat16,
    **config: object,
) -> EngineBench:
    ops = CudaOps(torch.device("cuda"), residual_dtype=residual_dtype, pdl=pdl)
    return EngineBench(random_decoder(shape, ops), ops, **config)


def bench_maker(shape: ModelConfig) -> Callable[..., EngineBench]:
    """Makes engines over the same weights, each with a configuration of its own."""
    ops = CudaOps(torch.device("cuda"))
    return partial(EngineBench, random_decoder(shape, ops), ops)


def compile_share(shape: ModelConfig, share: int, shares: int) -> None:
    """Compile a share of the kernels of a shape into Triton's cache, so that processes can do it together."""
    config = msgspec.structs.replace(shape, num_layers=1)
    ops = CudaOps(torch.device("cuda"))
    model = random_decoder(config, ops)
    cache = KVCache(model.kv_layout(64), 1, ops.device)
    runner = GpuModelRunner(
        model, ops, cache, device=ops.device, max_batched_tokens=16384, max_num_sequences=256, max_model_len=8192,
        use_graphs=False,
    )  # fmt: skip
    bounds = [2**i for i in range(15)]
    runner.compile(bounds[share::shares], [bound for bound in bounds[share::shares] if bound <= 512])
