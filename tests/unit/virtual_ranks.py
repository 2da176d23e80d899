"""Several ranks of one model in one process, a thread each; a gather waits for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cluster.engine.kernels import get_ops
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import LoadedModel, load_model
from cluster.engine.parallel.group import ParallelGroup, SingleRank
from tests.unit.model_factory import TOKENS, whole_sequence

CPU = torch.device("cpu")


def load(path: Path, group: ParallelGroup | None = None) -> LoadedModel:
    return load_model(path, get_ops("cpu", 1), group or SingleRank(), CPU)


class VirtualRank:
    """One of several ranks in this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, parts: list[torch.Tensor]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._parts = parts

    def all_gather_columns(self, local_TN: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        assert local_TN.shape[1] == widths[self.rank]
        return self._exchange(local_TN, lambda parts: torch.cat(parts, dim=1))

    def gather_expert_rows(
        self, local_TJK: torch.Tensor, experts_TJ: torch.Tensor, counts: tuple[int, ...]
    ) -> torch.Tensor:
        owner_TJ = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[experts_TJ.long()]
        local_TJK[owner_TJ != self.rank] = torch.nan  # nobody may read what is not this rank's

        def pick(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(parts).gather(0, owner_TJ[None, :, :, None].expand(1, *local_TJK.shape))[0]

        return self._exchange(local_TJK, pick)

    def _exchange(self, part: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self._parts[self.rank] = part
        self._barrier.wait(timeout=60)
        joined = join(self._parts)
        self._barrier.wait(timeout=60)
        return joined


def run_ranks(path: Path, size: int, rows_R: torch.Tensor | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`run_models` of a model's files."""
    return run_models(lambda group: load(path, group).model, size, rows_R)


def run_models(
    make_model: Callable[[ParallelGroup], DecoderModel], size: int, rows_R: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every rank's logits of some rows (None: of all), and the KV pools side by side: (N, L, 2, all KV heads, S, D)."""
    barrier = threading.Barrier(size)
    parts = [torch.empty(0)] * size

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = make_model(VirtualRank(rank, size, barrier, parts))
        step = whole_sequence(model, len(TOKENS))
        return model.forward(TOKENS, step.metadata, step.cache, rows_R), step.cache.kv_NL2HSD

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    return [logits for logits, _ in results], torch.cat([kv for _, kv in results], dim=3)
