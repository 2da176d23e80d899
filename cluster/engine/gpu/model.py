"""What a runner on a GPU needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kv_cache import KVCache


class GpuModel(Protocol):
    """A `Model` in two parts, so that logits can be made of some rows at a time; `DecoderModel` is one."""

    def hidden(
        self,
        token_ids_T: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        rows_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All layers: K and V of every row are stored; what `logits` reads, of some rows or of all."""
        ...

    def logits(self, hidden_TK: torch.Tensor, indices_R: torch.Tensor | None = None) -> torch.Tensor:
        """(R, V) fp32 of some rows."""
        ...

    def warm_up(self, row_counts: Sequence[int], logits_counts: Sequence[int]) -> None:
        """Use every kernel that steps of these sizes need once, beside attention's."""
        ...
