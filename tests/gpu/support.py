"""Inputs, comparisons and planted mistakes for the kernel tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import attention_launch
from cluster.engine.kernels.triton.plans import AttentionPlan

NUM_MULTIPROCESSORS = 132


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return num_differing(a, b) == 0


def num_differing(a: torch.Tensor, b: torch.Tensor) -> int:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return int((a.contiguous().view(integer) != b.contiguous().view(integer)).sum())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; NaN when anything is NaN."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def mutated(module: ModuleType, old: str, new: str, tmp_path: Path) -> ModuleType:
    """A copy of a kernel module with one planted mistake."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) >= 1, f"the mutation no longer applies: {old!r}"
    name = f"mutated_{abs(hash((old, new, str(tmp_path))))}"
    file = tmp_path / f"{name}.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


class Paged:
    """Sequences in a shuffled paged cache whose unused slots hold NaN, with all their rows' q."""

    def __init__(
        self, contexts: list[int], *, num_heads: int = 8, num_kv_heads: int = 2, head_size: int = 128,
        block_size: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.contexts, self.block_size = contexts, block_size
        counts = [-(-context // block_size) for context in contexts]
        shape = (sum(counts) + 1, 2, 2, num_kv_heads, block_size, head_size)
        kv = torch.randn(shape, generator=generator).to(dtype)
        order = torch.randperm(shape[0], generator=generator)
        table = torch.full((len(contexts), max(counts)), 2**30, dtype=torch.int32)
        place = 0
        for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            table[sequence, :count] = order[place : place + count].int()
            place += count
            kv[table[sequence, count - 1].long(), :, :, :, context - (count - 1) * block_size :] = float("nan")
        self.cache = kv.to(device)
        self.layer = self.cache[:, 1]
        self.table = table.to(device)
        # a few keys stand out, so that running maxima rise late in some rows and early in others
        self.q = [
            (torch.randn((c, num_heads, head_size), generator=generator) * 3).to(dtype).to(device) for c in contexts
        ]
        self.scale = head_size**-0.5

    def metadata(self, sequences: list[int], rows: list[int], contexts: list[int]) -> AttentionMetadata:
        device = self.layer.device
        starts = [0]
        for count in rows:
            starts.append(starts[-1] + count)
        positions = torch.cat([torch.arange(c - r, c) for r, c in zip(rows, contexts, strict=True)])
        return AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_table=self.table[sequences].contiguous(),
            slot_mapping=torch.full((starts[-1],), -1, dtype=torch.int64, device=device),
            positions=positions.to(device),
            num_rows_max=max(rows),
            context_len_max=max(contexts),
        )

    def attend(
        self,
        sequences: list[int],
        rows: list[int],
        contexts: list[int] | None = None,
        plan: AttentionPlan | None = None,
        *,
        window: int | None = None,
    ) -> list[torch.Tensor]:
        """The last `rows` rows of each sequence cut to its context, in one batch; one fp32 result per sequence."""
        contexts = contexts or [self.contexts[sequence] for sequence in sequences]
        metadata = self.metadata(sequences, rows, contexts)
        q = torch.cat([self.q[s][c - r : c] for s, r, c in zip(sequences, rows, contexts, strict=True)])
        out = attention_launch.run_attention(
            q, self.layer, metadata, self.scale, plan or AttentionPlan(), NUM_MULTIPROCESSORS, torch.float32,
            window=window,
        )  # fmt: skip
        return list(out.split(rows))

    def expected(self, sequence: int, window: int | None = None) -> torch.Tensor:
        """float64 causal attention of all rows."""
        context = self.contexts[sequence]
        blocks = self.table[sequence, : -(-context // self.block_size)].long()
        k, v = (self.layer[blocks, i].transpose(1, 2).flatten(0, 1)[:context].double() for i in (0, 1))
        q = self.q[sequence].double()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,khd->htk", q, k) * self.scale
        unseen = torch.ones((context, context), dtype=torch.bool, device=q.device).triu(1)
        if window is not None:
            unseen |= unseen.new_ones((context, context)).tril(-window)
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        return torch.einsum("htk,khd->thd", weights, v).flatten(1)


def in_graph(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a call replayed from a CUDA graph, with its output poisoned in between."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out.clone()
