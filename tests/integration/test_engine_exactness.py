"""The engine over a real (tiny, random) model and the CPU kernels: the same bits whatever the topology.

Compared are token ids, logprob floats and the KV bytes of every stored position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.events import PromptFinished
from cluster.engine.kernels import get_ops
from cluster.engine.kernels.mutations import break_kernel
from cluster.engine.kernels.ops import Ops
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.engine.scheduler import Policy
from cluster.engine.sequence import Sequence
from cluster.types import Request, TokenChunk
from decode.policy import DecodePolicy
from prefill.policy import PrefillPolicy
from tests.unit.engine_fakes import make_request
from tests.unit.model_factory import random_model, save_safetensors

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 47, 64, 65, 96, 128, 150)
MAX_TOKENS = 24
BLOCK_SIZE = 16
NUM_THREADS = 2
Answer = tuple[list[int], list[float], list[object]]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_safetensors(random_model("qwen3"), tmp_path_factory.mktemp("model"))


class Lab:
    """Makes engines over one loaded model."""

    def __init__(self, directory: Path, ops: Ops) -> None:
        self.ops = ops
        self.model = load_model(directory, self.ops, SingleRank(), torch.device("cpu")).model

    def engine(
        self,
        policy: Policy,
        num_blocks: int = 64,
        steps_ahead: int = 0,
        draft_model: DecoderModel | None = None,
        **config: Any,
    ) -> Engine:
        models = [self.model] if draft_model is None else [self.model, draft_model]
        kv_cache_bytes = num_blocks * sum(model.kv_layout(BLOCK_SIZE).block_bytes for model in models)
        settings = {"max_num_sequences": 16, "max_batched_tokens": 64, **config}
        return Engine(
            self.model,
            EngineConfig(block_size=BLOCK_SIZE, kv_cache_bytes=kv_cache_bytes, **settings),
            self.ops,
            policy,
            draft_model=draft_model,
            steps_ahead=steps_ahead,
        )


@pytest.fixture(scope="module")
def lab(model_directory: Path) -> Lab:
    return Lab(model_directory, get_ops("cpu", NUM_THREADS))


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    variants: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 1.0, "logprobs": 0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "logprobs": 3},
        {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 1},
        {"prompt_logprobs": 1, "logprobs": 1},
    ]
    return [
        make_request(
            f"r{index}",
            tuple(torch.randint(3, 320, (length,), generator=generator).tolist()),
            max_tokens=MAX_TOKENS,
            seed=index,
            ignore_eos=True,
            **variants[index % len(variants)],
        )
        for index, length in enumerate(LENGTHS)
    ]


def kv_digest(engine: Engine, sequence: Sequence) -> str:
    """Of the KV of every computed position but the last, whose row may be on its way."""
    return kv_of(engine, sequence, sequence.prompt_length + MAX_TOKENS - 2)


def kv_of(engine: Engine, sequence: Sequence, num_tokens: int) -> str:
    """Digest of the KV of the sequence's first tokens."""
    assert sequence.table is not None
    kv = engine.kv_cache.kv_NL2HSD[list(sequence.table.block_ids)]  # (M, L, 2, H, S, D)
    by_token = kv.permute(0, 4, 1, 2, 3, 5).reshape(-1, *kv.shape[1:4], kv.shape[5])
    stored = by_token[:num_tokens].contiguous()
    return hashlib.sha256(stored.view(torch.uint8).numpy().tobytes()).hexdigest()


def steps(engine: Engine, answers: dict[str, Answer], digests: dict[str, str]) -> Iterator[PromptFinished]:
    """Run to the end. Digests are taken when a sequence is about to draw its last token."""
    while engine.has_work():
        for sequence in engine.scheduler.running:
            if sequence.num_output_tokens == MAX_TOKENS - 1:
                digests[sequence.request.request_id] = kv_digest(engine, sequence)
        for event in engine.step():
            match event:
                case PromptFinished():
                    take(answers, event.chunk)
                    yield event
                case TokenChunk():
                    take(answers, event)
    engine.blocks.check_integrity()


def take(answers: dict[str, Answer], chunk: TokenChunk) -> None:
    assert chunk.error is None
    token_ids, logprobs, others = answers.setdefault(chunk.request_id, ([], [], []))
    assert chunk.index == len(token_ids)
    token_ids.extend(chunk.token_ids)
    logprobs.extend(each.logprob for each in chunk.logprobs)
    others.extend((each.rank, each.top) for each in chunk.logprobs)
    others.extend(chunk.prompt_logprobs)


def run(engine: Engine, batch: list[Request]) -> tuple[dict[str, Answer], dict[str, str]]:
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in batch:
        engine.add_request(request)
    assert not list(steps(engine, answers, digests))
    assert engine.blocks.num_free == engine.num_blocks
    return answers, digests


@pytest.fixture(scope="module")
def reference(lab: Lab) -> tuple[dict[str, Answer], dict[str, str]]:
    """Every request alone, its prompt in one piece, in a cache of its own."""
    answers: dict[str, Answer] = {}
    digests: dict[str, str] = {}
    for request in requests():
        one = run(lab.engine(DecodePolicy(), max_batched_tokens=256), [request])
        answers |= one[0]
        digests |= one[1]
    return answers, digests


@pytest.mark.parametrize(
    ("max_batched_tokens", "num_blocks"), [(16, 200), (97, 200), (64, 22)], ids=["small", "prime", "preempting"]
)
def test_one_process(
    lab: Lab, reference: tuple[dict[str, Answer], dict[str, str]], max_batched_tokens: int, num_blocks: int
) -> None:
    engine = lab.engine(DecodePolicy(), num_blocks=num_blocks, max_batched_tokens=max_batched_tokens)
    assert run(engine, requests()) == reference
    assert (engine.load().preemptions > 0) == (num_blocks == 22)
    assert run(engine, requests()) == reference  # now with what is left in the prefix cache
    assert (engine.load().cached_tokens > 0) or num_blocks == 22


def test_prefill_and_decode_engine(lab: Lab, reference: tuple[dict[str, Answer], dict[str, str]]) -> None:
    prefill = lab.engine(PrefillPolicy(), num_blocks=200, max_batched_tokens=37)
    decode = lab.engine(DecodePolicy(), num_blocks=200)
    for _round in range(2):
        answers: dict[str, Answer] = {}
        digests: dict[str, str] = {}
        by_id = {request.request_id: request for request in requests()}
        for request in by_id.values():
            prefill.add_request(request)
        for finished in steps(prefill, answers, {}):
            pull(prefill, decode, finished, by_id[finished.chunk.request_id])
            answers[finished.chunk.request_id][2].extend(finished.prompt_logprobs)
        assert not list(steps(decode, answers, digests))
        for request_id, answer in answers.items():
            assert answer[:2] == reference[0][request_id][:2]
            assert sorted(map(repr, answer[2])) == sorted(map(repr, reference[0][request_id][2]))
        assert digests == reference[1]
    assert prefill.blocks.num_free == decode.blocks.num_free == 200


def pull(prefill: Engine, decode: Engine, finished: PromptFinished, request: Request) -> None:
    assert finished.lease is not None
    continued = msgspec.structs.replace(
        request,
        token_ids=request.token_ids + finished.chunk.token_ids,
        num_prompt_tokens=len(request.token_ids),
    )
    reservation = decode.reserve_blocks(continued, finished.lease.num_tokens)
    assert reservation is not None
    decode.blocks.start_loading(reservation)
    sources = finished.lease.block_ids[reservation.num_shared_blocks :]
    decode.kv_cache.kv_NL2HSD[list(reservation.loading_block_ids)] = prefill.kv_cache.kv_NL2HSD[list(sources)]
    decode.add_loaded_request(continued, reservation)
    prefill.release(finished.lease)


def test_stale_pages_do_not_matter(lab: Lab, reference: tuple[dict[str, Answer], dict[str, str]]) -> None:
    """A pool full of NaN, as a reused page may be: nothing that was not written is read."""
    engine = lab.engine(DecodePolicy(), num_blocks=200)
    engine.kv_cache.kv_NL2HSD.fill_(torch.nan)
    assert run(engine, requests()[:6])[0] == {key: reference[0][key] for key in list(reference[0])[:6]}


def test_a_kernel_whose_order_depends_on_the_batch_is_noticed(model_directory: Path) -> None:
    """A linear kernel that sums a single row backwards: as accurate as the right one."""
    broken = Lab(model_directory, break_kernel(get_ops("cpu", NUM_THREADS), "linear"))
    together = run(broken.engine(DecodePolicy()), requests())
    alone = [run(broken.engine(DecodePolicy()), [request]) for request in requests()]
    num_different = sum(digests[key] != together[1][key] for _, digests in alone for key in digests)
    assert num_different > 0
