"""What speculation is worth: the same requests with and without, in turns on one machine, and equal tokens.

    python -m benchmarks.speculation [--device cpu|cuda] [--model demo|llama-8b|llama-tiny] [--method ngram|draft]
                                     [--budget SECONDS]

Two tasks, each one stream (or `--batch`):
    copy    the text repeats what was there before: `speedup_copy`, tokens/s with ÷ without, target 1.8
    random  it does not: `ratio_random`, which must not fall below 0.97

`--model demo` copies a listing and a letter that its prompts hold, greedily; its random text is drawn at
temperature 1. `llama-8b` has the shape of Llama 3 8B and random weights. Such a model writes no text that
is worth copying, so its copy task is a loop by construction: its vocabulary is a cycle, each token's
successor is what the embedding says, and the layers in between cost what they cost. Its random text is
that of ordinary random weights at temperature 1 (greedily they fall into loops). The recorded lines say
which it was.

`--method draft` needs `--draft`, a model as `--model` takes it; llama-8b has one layer of its own as draft.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from msgspec import structs

from benchmarks.gpu.random_model import LLAMA_8B, random_decoder
from benchmarks.results import RESULTS_DIRECTORY, append_result, processor_name
from benchmarks.speculation_texts import COPY_PROMPTS, RANDOM_PROMPTS
from cluster.engine.config import EngineConfig, SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.kernels import get_ops
from cluster.engine.kernels.ops import Ops
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.tokenizer import Tokenizer
from cluster.types import Request, SamplingParams, TokenChunk
from decode.policy import DecodePolicy

MIN_ROUNDS = 2  # one to warm up, one to measure
POOL_TOKENS = 1 << 15
LOOP = 64  # tokens of the built-in cycle; the prompt holds it twice
LOOP_SCALE = 64.0  # of the embedding: so much louder than what the layers add that it alone decides


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    text: str  # what kind of text it is, for the record
    model: DecoderModel
    draft: DecoderModel | None
    prompts: Sequence[Sequence[int]]
    temperature: float


@dataclass(frozen=True, slots=True)
class Run:
    tokens: tuple[tuple[int, ...], ...]
    tokens_per_s: float


class Side:
    """One engine: with speculation or without."""

    def __init__(self, task: Task, ops: Ops, speculation: SpeculationConfig) -> None:
        draft = task.draft if speculation.method == "draft" else None
        models = [task.model] if draft is None else [task.model, draft]
        token_bytes = sum(model.kv_layout(64).block_bytes for model in models) // 64
        config = EngineConfig(
            device=str(ops.device),
            block_size=64,
            kv_cache_bytes=POOL_TOKENS * token_bytes,
            max_model_len=min(POOL_TOKENS // 4, task.model.max_position),
            max_batched_tokens=1024,
            max_num_sequences=64,
            speculation=speculation,
        )
        self.engine = Engine(task.model, config, ops, DecodePolicy(), draft_model=draft)
        self._task = task
        self._num_runs = 0

    def run(self, num_tokens: int) -> Run:
        """Tokens per second behind the first tokens of all prompts."""
        self._num_runs += 1
        tokens: dict[str, list[int]] = {}
        for index, prompt in enumerate(self._task.prompts):
            sampling = SamplingParams(
                max_tokens=num_tokens, seed=index, temperature=self._task.temperature, ignore_eos=True
            )
            name = f"{self._num_runs}-{index}"
            tokens[name] = []
            self.engine.add_request(Request(request_id=name, token_ids=tuple(prompt), sampling=sampling))
        started_at, num_before = 0.0, 0
        while self.engine.has_work():
            for event in self.engine.step():
                assert isinstance(event, TokenChunk)
                tokens[event.request_id].extend(event.token_ids)
            if not started_at and all(tokens.values()):
                started_at, num_before = time.perf_counter(), sum(map(len, tokens.values()))
        seconds = time.perf_counter() - started_at
        num_timed = sum(map(len, tokens.values())) - num_before
        return Run(tuple(map(tuple, tokens.values())), num_timed / seconds)


def compare(
    task: Task, ops: Ops, speculation: SpeculationConfig, rounds: int, num_tokens: int, deadline_s: float = math.inf
) -> dict[str, float]:
    """Medians over rounds of without, with, without, with, ...; the first of each is thrown away. After
    `deadline_s` (of time.monotonic()) no round is begun but the first two."""
    plain, speculating = Side(task, ops, SpeculationConfig()), Side(task, ops, speculation)
    speeds: dict[Side, list[float]] = {plain: [], speculating: []}
    for number in range(rounds + 1):
        if number >= MIN_ROUNDS and time.monotonic() > deadline_s:
            break
        tokens = []
        for side, measured in speeds.items():
            run = side.run(num_tokens)
            measured.append(run.tokens_per_s)
            tokens.append(run.tokens)
        assert tokens[0] == tokens[1], "speculation has changed the tokens"
    without, with_ = (statistics.median(measured[1:]) for measured in speeds.values())
    load = speculating.engine.load()
    return {
        "ratio": with_ / without,
        "with_tokens_s": with_,
        "without_tokens_s": without,
        "accepted_share": load.spec_accepted_tokens / max(load.spec_draft_tokens, 1),
        "drafts_per_token": load.spec_draft_tokens / load.generation_tokens,
        "accepted_per_token": load.spec_accepted_tokens / load.generation_tokens,
        "rounds": len(speeds[plain]) - 1,
    }


# ---- models and tasks


def demo_tasks(ops: Ops, batch: int, draft: str | None) -> list[Task]:
    model = load_model("demo", ops, SingleRank(), ops.device).model
    tokenizer = Tokenizer.load("demo")
    guesser = None if draft is None else load_model(draft, ops, SingleRank(), ops.device).model

    def prompts(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(texts[index % len(texts)]) for index in range(batch)]

    return [
        Task("copy", "a listing or letter in the prompt, copied greedily", model, guesser, prompts(COPY_PROMPTS), 0.0),
        Task("random", "stories, temperature 1", model, guesser, prompts(RANDOM_PROMPTS), 1.0),
    ]


def random_tasks(ops: Ops, batch: int, *, is_tiny: bool) -> list[Task]:
    config = LLAMA_8B
    if is_tiny:  # to see on a CPU that everything works
        config = structs.replace(config, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_size=64)
        config = structs.replace(config, ffn_size=512, vocab_size=8192, bos_token_id=1, eos_token_ids=(2,))
    model = random_decoder(config, ops, max_position=POOL_TOKENS // 4)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randint(100, config.vocab_size - 300, (batch, 4 * LOOP), generator=generator).tolist()
    loops = [[1000 + (index * 17 + place) % LOOP for place in range(2 * LOOP)] for index in range(batch)]
    looping = cyclic(model, ops)
    return [
        Task("copy", f"random weights, a built-in cycle of {LOOP} tokens", looping, one_layer(looping), loops, 0.0),
        Task("random", "random weights, temperature 1", model, one_layer(model), noise, 1.0),
    ]


def cyclic(model: DecoderModel, ops: Ops) -> DecoderModel:
    """The same layers between an embedding and an lm_head by which each token has a successor: the next id
    of its group of LOOP ids."""
    embedding = model.weights.embedding_VK
    assert embedding is not None
    ids = torch.arange(len(embedding), device=embedding.device)
    group = (ids - 1000) // LOOP * LOOP
    before = 1000 + group + (ids - 1000 - group - 1) % LOOP
    before = torch.where((before >= 0) & (before < len(embedding)), before, ids)
    weights = replace(
        model.weights, embedding_VK=embedding * LOOP_SCALE / embedding.std(), lm_head=ops.pack_linear(embedding[before])
    )
    return DecoderModel(model.config, weights, ops, SingleRank())


def one_layer(model: DecoderModel) -> DecoderModel:
    """A draft model: the embedding, the first layer and the lm_head of the target."""
    weights = replace(model.weights, layers=model.weights.layers[:1])
    return DecoderModel(structs.replace(model.config, num_layers=1), weights, model.ops, model.group)


def main() -> int:
    arguments = _parse_arguments()
    started_s = time.monotonic()
    torch.set_num_threads(1)  # as in a worker, whose kernels bring their own threads
    ops = get_ops(arguments.device)
    draft_path = arguments.draft if arguments.method == "draft" else None
    if arguments.model == "demo":
        tasks = demo_tasks(ops, arguments.batch, draft_path)
    else:
        tasks = random_tasks(ops, arguments.batch, is_tiny=arguments.model == "llama-tiny")
    name = "given" if arguments.method == "draft" else None
    speculation = SpeculationConfig(method=arguments.method, num_tokens=arguments.num_tokens, draft_model=name)
    device = torch.cuda.get_device_name() if ops.device.type == "cuda" else processor_name()
    for index, task in enumerate(tasks):
        deadline_s = started_s + arguments.budget * (index + 1) / len(tasks)
        measured = compare(task, ops, speculation, arguments.rounds, arguments.tokens, deadline_s)
        metric = {"copy": "speedup_copy", "random": "ratio_random"}[task.name]
        ratio = measured.pop("ratio")
        params = {
            "model": arguments.model,
            "method": arguments.method,
            "draft": draft_path,
            "text": task.text,
            "batch": arguments.batch,
            "tokens": arguments.tokens,
            "most_drafts": arguments.num_tokens,
            **{name: round(value, 4) for name, value in measured.items()},
        }
        print(f"{metric:14} {ratio:6.3f} x  {params}", flush=True)
        if not arguments.dry_run:
            append_result("speculation", metric, round(ratio, 4), "x", params, device=device, directory=arguments.out)
        gc.collect()  # two pools, which may know each other, make room for the next task's
        torch.cuda.empty_cache()
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--model", default="demo", choices=("demo", "llama-8b", "llama-tiny"))
    parser.add_argument("--method", default="ngram", choices=("ngram", "draft"))
    parser.add_argument("--draft", metavar="MODEL", help="draft model of the demo model; `demo` is allowed")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="per answer")
    parser.add_argument("--num-tokens", type=int, default=SpeculationConfig().num_tokens, help="the most drafts a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds, after which no round is begun")
    parser.add_argument("--out", type=Path, default=RESULTS_DIRECTORY, help="a directory")
    parser.add_argument("--dry-run", action="store_true", help="print only, write no result lines")
    arguments = parser.parse_args()
    if arguments.method == "draft" and arguments.model == "demo" and arguments.draft is None:
        parser.error("--method draft --model demo needs --draft")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
