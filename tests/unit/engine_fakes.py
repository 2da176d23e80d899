"""A model whose every logit depends on every token before it, read from the paged KV cache.

It multiplies nothing: a row's logits are a hash of the tokens and positions that the cache holds for its
context. One wrong block, one stale slot or one row out of place changes the tokens that are drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from cluster.engine.config import EngineConfig, SpeculationConfig
from cluster.engine.engine import Engine
from cluster.engine.events import EngineEvent
from cluster.engine.kernels.ops import AttentionMetadata, Ops
from cluster.engine.kv_cache import KVCache, KVLayout
from cluster.engine.scheduler import Policy
from cluster.types import Request, SamplingParams, TokenChunk, TokenLogprob

VOCAB_SIZE = 61
EOS = 60
NAN_TOKEN = 59  # a context that ends in it has NaN logits
BLOCK_SIZE = 16
_PRIME = 1_000_003


class FakeOps:
    name = "fake"
    residual_dtype = torch.float32

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row.double().logsumexp(0).float() for row in logits_TV]
        return logits_TV.max(-1).values, torch.stack(rows)


@dataclass(frozen=True)
class FakeShape:
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = (EOS,)
    max_position: int = 512


@dataclass
class FakeModel:
    """`period` above 0: the token that lies so far back is likely to come again, so texts repeat themselves.
    `errs_every` above 0: what it says of each so many-th position is another token, as a draft model would."""

    config: FakeShape = field(default_factory=FakeShape)
    period: int = 0
    errs_every: int = 0
    num_rows: list[int] = field(default_factory=list)  # of each step

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(num_layers=2, num_kv_heads=1, head_size=2, block_size=block_size)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        logits_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert logits_indices is not None
        self.num_rows.append(len(token_ids_T))
        block_size = kv_cache.layout.block_size
        kv_N2HSD = kv_cache.layer(1)
        blocks, offsets = metadata.slot_mapping // block_size, metadata.slot_mapping % block_size
        kv_N2HSD[blocks, 0, 0, offsets, 0] = token_ids_T.to(torch.bfloat16)
        kv_N2HSD[blocks, 1, 0, offsets, 1] = (metadata.positions % 256).to(torch.bfloat16)
        logits = [self._logits(row, metadata, kv_N2HSD, block_size) for row in logits_indices.tolist()]
        return torch.stack(logits) if logits else torch.zeros((0, VOCAB_SIZE))

    def _logits(self, row: int, metadata: AttentionMetadata, kv_N2HSD: torch.Tensor, block_size: int) -> torch.Tensor:
        index = int((metadata.query_start <= row).sum()) - 1
        length = int(metadata.positions[row]) + 1
        assert length <= int(metadata.context_len[index])
        positions = torch.arange(length)
        blocks = metadata.block_table[index, positions // block_size].long()
        tokens = kv_N2HSD[blocks, 0, 0, positions % block_size, 0].long()
        stored_positions = kv_N2HSD[blocks, 1, 0, positions % block_size, 1].long()
        if tokens[-1] == NAN_TOKEN:
            return torch.full((VOCAB_SIZE,), torch.nan)
        digest = int(((tokens * 7919 + stored_positions * 104_729 + 1) * (positions + 1)).sum()) % _PRIME
        ids = torch.arange(VOCAB_SIZE)
        logits = ((digest + 17) * (ids + 3) * (ids + 11) % _PRIME).float() / 100_000.0
        logits[NAN_TOKEN] = -50.0
        logits[EOS] -= 4.0
        if self.period and length > self.period and digest % 16:
            logits[tokens[length - self.period]] += 9.0
        if self.errs_every and length % self.errs_every == 0:
            logits[(int(logits.argmax()) + 1) % NAN_TOKEN] += 50.0
        return logits


def make_engine(
    policy: Policy,
    *,
    num_blocks: int = 64,
    max_batched_tokens: int = 64,
    max_num_sequences: int = 8,
    max_model_len: int = 256,
    enable_prefix_caching: bool = True,
    steps_ahead: int = 0,
    clock: itertools.count[int] | None = None,
    period: int = 0,
    speculation: SpeculationConfig | None = None,
    draft_model: FakeModel | None = None,
) -> Engine:
    model = FakeModel(period=period)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=num_blocks * model.kv_layout(BLOCK_SIZE).block_bytes * (1 if draft_model is None else 2),
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=enable_prefix_caching,
        speculation=speculation or SpeculationConfig(),
    )
    return Engine(
        model,
        config,
        cast(Ops, FakeOps()),
        policy,
        draft_model=draft_model,
        steps_ahead=steps_ahead,
        clock=lambda: next(clock) if clock else 0,
    )


def make_request(
    request_id: str, token_ids: tuple[int, ...], *, num_prompt_tokens: int = 0, attempt: int = 0, **sampling: Any
) -> Request:
    parameters = {"max_tokens": 8, "seed": 1, "temperature": 0.0, **sampling}
    return Request(
        request_id=request_id,
        token_ids=token_ids,
        sampling=SamplingParams(**parameters),
        num_prompt_tokens=num_prompt_tokens,
        attempt=attempt,
    )


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    """`length` token ids that differ by salt, none of them special."""
    return tuple((position * position * 5 + position * 3 + salt * 11 + salt) % 59 for position in range(length))


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)

    @property
    def last(self) -> TokenChunk:
        return self.chunks[-1]


def run_all(engine: Engine, max_steps: int = 5000, check_each_step: bool = False) -> dict[str, Outcome]:
    """Step until nothing is left; by request id, what came out. Chunks must be in order of index."""
    outcomes: dict[str, Outcome] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return outcomes
        collect(outcomes, engine.step())
        if check_each_step:
            engine.blocks.check_integrity()
    raise AssertionError(f"still working after {max_steps} steps")


def collect(outcomes: dict[str, Outcome], events: list[EngineEvent]) -> None:
    for event in events:
        assert isinstance(event, TokenChunk)
        outcome = outcomes.setdefault(event.request_id, Outcome())
        assert not outcome.chunks or outcome.last.finish_reason is None, "an event after the terminal one"
        if outcome.chunks:
            assert event.index == outcome.last.index + len(outcome.last.token_ids)
        outcome.chunks.append(event)
        outcome.token_ids.extend(event.token_ids)
        outcome.logprobs.extend(event.logprobs)
