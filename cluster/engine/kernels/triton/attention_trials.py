"""Trials (`plan_admission.py`) of the two attention paths, on small caches of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import msgspec
import torch

from cluster.engine.kernels.ops import AttentionMetadata, Rotation
from cluster.engine.kernels.triton.plans import REFERENCE_ATTENTION, SPLIT_KEYS, AttentionPlan, LatentPlan

# Of the sequences: contexts that end before, at and after a split's edge, and rows that are not whole tiles.
_CONTEXTS = (2 * SPLIT_KEYS + 77, 70, SPLIT_KEYS + 1, 2, 64, 900, SPLIT_KEYS, 640)
_FEW_ROWS = (16, 3, 1, 1, 9, 16, 2, 5)
_MANY_ROWS = (300, 65, 200, 2, 64, 3, 130, 33)
_LONGER_BY_WINDOW = (0, 5)  # sequences some of whose keys lie before the window
_MAX_WINDOW = 4096  # one that is longer hides nothing here
_UNBOUNDED = 1 << 20  # rows


def prefill_fields(plan: AttentionPlan | LatentPlan) -> dict[str, Any]:
    """Those of the tiled path."""
    return {name: getattr(plan, name) for name in plan.__struct_fields__ if name.startswith("prefill_")}


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """`metadata` is padded to the sequences of the step, `unpadded` is not."""

    q_THD: torch.Tensor
    kv_N2GSD: torch.Tensor
    metadata: AttentionMetadata
    unpadded: AttentionMetadata


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What is attended to. `split_rows`: no sequence has more rows, and the split kernels serve them; 0: all have
    several, and the tiled kernel serves."""

    num_heads: int
    cache_shape: tuple[int, int, int]  # KV heads, block size, head size
    dtype: torch.dtype
    window: int | None
    split_rows: int
    num_sequences: int
    device: torch.device

    @property
    def subject(self) -> str:
        num_kv_heads, block_size, head_size = self.cache_shape
        rows = f"up to {self.split_rows} rows of a sequence" if self.split_rows else "many rows of a sequence"
        window = "" if self.window is None else f", window {self.window}"
        shape = f"{self.num_heads} heads on {num_kv_heads} x {head_size}, blocks of {block_size}"
        return f"attention, {shape}, {rows}, {self.num_sequences} sequences{window}"

    @property
    def scope(self) -> Hashable:
        sequences = max(4, (self.num_sequences - 1).bit_length())  # the sizes that kernels are compiled for
        shape = (self.num_heads, self.cache_shape, self.dtype, self.window)
        return "attention", *shape, self.split_rows, sequences

    def draw(self, seed: int) -> AttentionInputs:
        """Blocks lie in any order, and what no row may read is NaN."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        num_kv_heads, block_size, head_size = self.cache_shape
        contexts = list(_CONTEXTS)
        if self.window is not None:
            for sequence in _LONGER_BY_WINDOW:
                contexts[sequence] += min(self.window, _MAX_WINDOW)
        rows = [min(count, self.split_rows) for count in _FEW_ROWS] if self.split_rows else list(_MANY_ROWS)
        rows = [min(count, context) for count, context in zip(rows, contexts, strict=True)]
        counts = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
        table = torch.zeros((max(len(contexts), self.num_sequences), max(counts)), dtype=torch.int32)
        shape = (sum(counts) + 1, 2, num_kv_heads, block_size, head_size)
        kv = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        kv[0] = torch.nan
        for sequence, blocks in enumerate(order.split(counts)):
            table[sequence, : len(blocks)] = blocks.int()
            kv[int(blocks[-1]), :, :, contexts[sequence] - (len(blocks) - 1) * block_size :] = torch.nan
        q_shape = (sum(rows), self.num_heads, head_size)
        q = torch.randn(q_shape, generator=generator, device=self.device, dtype=self.dtype) * 3
        padding = len(table) - len(contexts)
        return AttentionInputs(
            q, kv, self._metadata(contexts + [1] * padding, rows + [0] * padding, table),
            self._metadata(contexts, rows, table[: len(contexts)]),
        )  # fmt: skip

    def _metadata(self, contexts: list[int], rows: list[int], table: torch.Tensor) -> AttentionMetadata:
        device, num_rows = self.device, sum(rows)
        return AttentionMetadata(
            query_start=torch.tensor([0, *accumulate(rows)], dtype=torch.int32, device=device),
            context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_table=table.to(device),
            slot_mapping=torch.full((num_rows,), -1, dtype=torch.int64, device=device),
            positions=torch.zeros(num_rows, dtype=torch.int64, device=device),
            num_rows_max=self.split_rows or _UNBOUNDED,
            context_len_max=max(contexts),
            num_rows_min=1 if self.split_rows else 2,
        )


@dataclass(frozen=True, slots=True)
class AttentionTrial:
    """`run`: q, one layer's cache, metadata, as they are served. Results are compared with those of the tiled kernel in
    its plainest form: a row has the same bits however it is computed."""

    run: Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, AttentionPlan], torch.Tensor]
    wanted: AttentionPlan
    case: AttentionCase

    @property
    def subject(self) -> str:
        return self.case.subject

    @property
    def others(self) -> Sequence[AttentionPlan]:
        """Only the part of this path changes: the other one has a verdict of its own."""
        if not self.case.split_rows:
            return (msgspec.structs.replace(self.wanted, **prefill_fields(REFERENCE_ATTENTION)),)
        one_stage = msgspec.structs.replace(self.wanted, split_num_warps=4, split_num_stages=1)
        return one_stage, msgspec.structs.replace(self.wanted, few_rows_kind="tiled")

    def scope(self, plan: AttentionPlan) -> Hashable:
        return self.case.scope

    def draw(self, seed: int, plan: AttentionPlan) -> AttentionInputs:
        return self.case.draw(seed)

    def expected(self, inputs: AttentionInputs) -> list[torch.Tensor]:
        return [self.run(inputs.q_THD, inputs.kv_N2GSD, inputs.unpadded, REFERENCE_ATTENTION)]

    def found(self, inputs: AttentionInputs, plan: AttentionPlan) -> list[torch.Tensor]:
        return [self.run(inputs.q_THD, inputs.kv_N2GSD, inputs.metadata, plan)]


@dataclass(frozen=True, slots=True)
class RopeInputs:
    """A cache in which the rows' own keys are not stored yet. `metadata` is padded to the sequences of the step."""

    qkv_TC: torch.Tensor
    kv_N2GSD: torch.Tensor
    metadata: AttentionMetadata
    unpadded: AttentionMetadata
    rotation: Rotation


@dataclass(frozen=True, slots=True)
class RopeAttentionTrial:
    """Steps of single rows whose split kernel rotates and stores, too, beside the rotary kernel and the tiled one.

    `run`: qkv, one layer's cache, metadata, rotation, as they are served. What was stored is compared as well.
    """

    run: Callable[[torch.Tensor, torch.Tensor, AttentionMetadata, Rotation, AttentionPlan], torch.Tensor]
    wanted: AttentionPlan
    case: AttentionCase  # of single rows
    qkv_dtype: torch.dtype

    @property
    def subject(self) -> str:
        return f"rotary embedding in {self.case.subject}"

    @property
    def others(self) -> Sequence[AttentionPlan]:
        return msgspec.structs.replace(self.wanted, split_rope_up_to=0), REFERENCE_ATTENTION

    def scope(self, plan: AttentionPlan) -> Hashable:
        return "rope", self.qkv_dtype, self.case.scope

    def draw(self, seed: int, plan: AttentionPlan) -> RopeInputs:
        inputs, num_heads, device = self.case.draw(seed), self.case.num_heads, self.case.device
        num_kv_heads, block_size, head_size = self.case.cache_shape
        last_T = inputs.unpadded.context_len.long() - 1
        block_T = inputs.unpadded.block_table.gather(1, (last_T // block_size)[:, None])[:, 0].long()
        inputs.kv_N2GSD[block_T, :, :, last_T % block_size] = torch.nan
        slot_T = block_T * block_size + last_T % block_size
        generator = torch.Generator(device=device).manual_seed(seed)
        num_columns = (num_heads + 2 * num_kv_heads) * head_size
        qkv = torch.randn((len(last_T), num_columns), generator=generator, device=device) * 3
        angles = torch.randn((int(last_T.max()) + 1, head_size), generator=generator, device=device)
        return RopeInputs(
            qkv.to(self.qkv_dtype), inputs.kv_N2GSD,
            replace(inputs.metadata, slot_mapping=slot_T, positions=last_T),
            replace(inputs.unpadded, slot_mapping=slot_T, positions=last_T), Rotation(angles, num_heads),
        )  # fmt: skip

    def expected(self, inputs: RopeInputs) -> list[torch.Tensor]:
        return self._results(inputs, inputs.unpadded, REFERENCE_ATTENTION)

    def found(self, inputs: RopeInputs, plan: AttentionPlan) -> list[torch.Tensor]:
        return self._results(inputs, inputs.metadata, plan)

    def _results(self, inputs: RopeInputs, metadata: AttentionMetadata, plan: AttentionPlan) -> list[torch.Tensor]:
        """(T, H * D), and (T, 2, G, D) of the cache."""
        kv_N2GSD = inputs.kv_N2GSD.clone()
        out = self.run(inputs.qkv_TC, kv_N2GSD, metadata, inputs.rotation, plan)
        slot_T = metadata.slot_mapping
        return [out, kv_N2GSD[slot_T // kv_N2GSD.shape[3], :, :, slot_T % kv_N2GSD.shape[3]]]
