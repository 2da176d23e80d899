"""Digests do not depend on layout and depend on everything else; the ledger is honest about reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cluster.engine.kv_cache import KVCache, KVLayout
from kvconnector.digest import Digests, KVDigester, Span
from kvconnector.ledger import FILLED, FIRST_DIGEST, GENERATION, Ledger, LedgerRecords, Verdict, record_bytes

NUM_TOKENS, LAYERS, HEADS, DIM = 70, 3, 4, 16


def make_layout(block_size: int, layers: int = LAYERS, heads: int = HEADS, dtype: str = "bfloat16") -> KVLayout:
    return KVLayout(num_layers=layers, num_kv_heads=heads, head_size=DIM, block_size=block_size, dtype=dtype)


def make_content(seed: int = 0) -> torch.Tensor:
    """(tokens, layers, 2, heads, dim)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((NUM_TOKENS, LAYERS, 2, HEADS, DIM), generator=generator).to(torch.bfloat16)


def store(
    content: torch.Tensor, block_size: int, layers: range = range(LAYERS), heads: range = range(HEADS), seed: int = 1
) -> tuple[KVCache, list[int]]:
    """The content in a pool of that geometry, in blocks in random order."""
    layout = make_layout(block_size, len(layers), len(heads))
    cache = KVCache(layout, 32, torch.device("cpu"))
    cache.kv_NL2HSD.fill_(float("nan"))
    block_ids = [int(block) for block in np.random.default_rng(seed).permutation(32)[: -(-len(content) // block_size)]]
    part = content[:, layers.start : layers.stop, :, heads.start : heads.stop]
    for token in range(len(content)):
        cache.kv_NL2HSD[block_ids[token // block_size], :, :, :, token % block_size] = part[token]
    return cache, block_ids


def digest(content: torch.Tensor, block_size: int = 16, start: int = 0, end: int = NUM_TOKENS) -> list[int]:
    cache, block_ids = store(content, block_size)
    return [int(value) for value in KVDigester(cache.kv_NL2HSD, cache.layout).tokens(block_ids, start, end)]


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_size_and_order_do_not_matter(block_size: int) -> None:
    assert digest(make_content(), block_size) == digest(make_content(), 64)


@pytest.mark.parametrize("boundary", [1, 2])
def test_pipeline_stages_add_up(boundary: int) -> None:
    content = make_content()
    total = np.zeros(HEADS, dtype=np.uint64)
    for layers in (range(boundary), range(boundary, LAYERS)):
        cache, block_ids = store(content, 16, layers=layers)
        total += KVDigester(cache.kv_NL2HSD, cache.layout, first_layer=layers.start).tokens(block_ids, 0, NUM_TOKENS)
    assert total.tolist() == digest(content)


def test_ranks_see_their_heads() -> None:
    content = make_content()
    cache, block_ids = store(content, 16, heads=range(1, 3))
    part = KVDigester(cache.kv_NL2HSD, cache.layout, first_kv_head=1).tokens(block_ids, 0, NUM_TOKENS)
    assert part.tolist() == digest(content)[1:3]


def test_latent_rows_add_up_over_stages_and_block_sizes() -> None:
    content = make_content()[:, :, :1, :1]  # one plane, one head

    def digest_of(block_size: int, layers: range) -> int:
        layout = KVLayout(num_layers=len(layers), num_kv_heads=1, head_size=DIM, block_size=block_size, num_planes=1)
        cache = KVCache(layout, 32, torch.device("cpu"))
        block_ids = list(range(31, 31 - -(-NUM_TOKENS // block_size), -1))
        for token in range(NUM_TOKENS):
            rows = content[token, layers.start : layers.stop]
            cache.kv_NL2HSD[block_ids[token // block_size], :, :, :, token % block_size] = rows
        digester = KVDigester(cache.kv_NL2HSD, layout, first_layer=layers.start)
        return int(digester.tokens(block_ids, 0, NUM_TOKENS)[0])

    whole = digest_of(16, range(LAYERS))
    assert digest_of(64, range(LAYERS)) == whole
    assert (digest_of(16, range(1)) + digest_of(48, range(1, LAYERS))) % (1 << 64) == whole
    assert digest_of(16, range(1)) != digest_of(16, range(1, 2))


def test_ranges_of_tokens_add_up() -> None:
    parts = [digest(make_content(), 16, start, end) for start, end in ((0, 5), (5, 33), (33, NUM_TOKENS))]
    total = np.array(parts, dtype=np.uint64).sum(axis=0, dtype=np.uint64)
    assert total.tolist() == digest(make_content())


def flip_sign(content: torch.Tensor) -> None:
    content[3, 1, 0, 2, 3] *= -1
    content[3, 1, 0, 2, 7] *= -1  # the top bits of two words: a product alone would cancel them


def swap_tokens(content: torch.Tensor) -> None:
    content[[10, 11]] = content[[11, 10]]


def swap_layers(content: torch.Tensor) -> None:
    content[:, [0, 1]] = content[:, [1, 0]]


def swap_key_and_value(content: torch.Tensor) -> None:
    content[:, :, [0, 1]] = content[:, :, [1, 0]]


def swap_elements(content: torch.Tensor) -> None:
    content[5, 0, 0, 2, [0, 8]] = content[5, 0, 0, 2, [8, 0]]


def negate_zero(content: torch.Tensor) -> None:
    content[0, 0, 0, 2, 0] = -0.0


@pytest.mark.parametrize(
    "change", [flip_sign, swap_tokens, swap_layers, swap_key_and_value, swap_elements, negate_zero]
)
def test_every_change_changes_the_digest_of_its_head(change: object) -> None:
    content = make_content()
    content[0, 0, 0, 2, 0] = 0.0
    changed = content.clone()
    assert callable(change)
    change(changed)
    before, after = digest(content), digest(changed)
    assert before[2] != after[2]


def test_swapped_heads_are_noticed() -> None:
    content = make_content()
    changed = content.clone()
    changed[:, :, :, [0, 1]] = changed[:, :, :, [1, 0]]
    assert sorted(digest(content)) != sorted(digest(changed))


def test_ledger_grows_with_the_prompt_and_forgets_on_reuse() -> None:
    content = make_content()
    cache, block_ids = store(content, 16)
    ledger = Ledger(32, 16, HEADS, KVDigester(cache.kv_NL2HSD, cache.layout))
    for block_id in block_ids:
        ledger.on_allocated(block_id, 5)
    generations = [5] * len(block_ids)

    def read() -> LedgerRecords:
        return LedgerRecords(ledger.memory.numpy()[block_ids].copy())

    assert read().judge_filling(generations, NUM_TOKENS, 16) is Verdict.NOT_FILLED
    for num_tokens in (1, 16, 33, 69):
        ledger.advance(block_ids, num_tokens)
        assert read().judge_filling(generations, NUM_TOKENS, 16) is Verdict.NOT_FILLED
    ledger.advance(block_ids, NUM_TOKENS)
    assert read().judge_filling(generations, NUM_TOKENS, 16) is Verdict.GOOD
    assert read().digests().tolist() == digest(content)
    before = ledger.memory.clone()
    ledger.advance(block_ids, NUM_TOKENS)
    assert torch.equal(before, ledger.memory)

    ledger.on_allocated(block_ids[2], 6)
    record = ledger.memory[block_ids[2]].tolist()
    assert (record[GENERATION], record[FILLED], record[FIRST_DIGEST:]) == (6, 0, [0] * HEADS)
    assert read().judge_filling(generations, NUM_TOKENS, 16) is Verdict.STALE
    assert ledger.memory.shape[1] * 8 == record_bytes(HEADS)


class LateDigester(KVDigester):
    """Digests that arrive when they are let go, as a GPU's do."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache.kv_NL2HSD, cache.layout)
        self.is_let_go = False

    def begin(self, spans: Sequence[Span]) -> Digests:
        return Late(self, super().begin(spans))


class Late(NamedTuple):
    digester: LateDigester
    digests: Digests

    def is_ready(self) -> bool:
        return self.digester.is_let_go

    def values(self) -> npt.NDArray[np.uint64]:
        return self.digests.values()


def test_a_block_counts_as_filled_when_its_digest_has_arrived() -> None:
    content = make_content()
    cache, block_ids = store(content, 16)
    digester = LateDigester(cache)
    ledger = Ledger(32, 16, HEADS, digester)
    for block_id in block_ids:
        ledger.on_allocated(block_id, 5)
    ledger.advance(block_ids, 20)
    ledger.advance(block_ids, 20)  # nothing is begun twice
    ledger.advance(block_ids, NUM_TOKENS)
    assert bool(ledger.is_waiting)
    assert ledger.memory[block_ids, FILLED].sum() == 0
    ledger.on_allocated(block_ids[1], 6)  # reused while its digests were on their way
    digester.is_let_go = True
    ledger.poll()
    assert bool(ledger.is_waiting) is False
    assert ledger.memory[block_ids, FILLED].tolist() == [16, 0, 16, 16, 6]
    assert ledger.memory[block_ids[1], FIRST_DIGEST:].tolist() == [0] * HEADS
    ledger.advance(block_ids, NUM_TOKENS)
    found = ledger.memory[block_ids, FIRST_DIGEST:].numpy().view(np.uint64).sum(axis=0, dtype=np.uint64)
    assert found.tolist() == digest(content)
