"""The weights of latent attention as checkpoints hold them -> as `latent.py` wants them.

A checkpoint rotates pairs (2i, 2i + 1), the kernels pairs (i, i + R/2): rows that make rotated dimensions are
put in that order here. W_UK and W_UV are the rows of `kv_b_proj`, head by head; W_UK is turned, for it goes
from a query to a latent row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import Ops
from cluster.engine.models.config import LatentConfig, ModelConfig
from cluster.engine.models.latent import LatentAttention, NarrowQueries
from cluster.engine.models.weights_fp8 import Copy
from cluster.engine.parallel.sharding import Range


@dataclass(frozen=True, slots=True)
class LatentReader:
    """Reads one layer's tensors, for the query heads of one rank."""

    config: ModelConfig
    latent: LatentConfig
    heads: Range
    copy: Copy
    ops: Ops

    def qkv(self, prefix: str) -> torch.Tensor:
        """The rows of `LayerWeights.qkv`, on the host."""
        hidden, rank = self.config.hidden_size, self.latent.q_lora_rank
        if rank is None:
            queries = self._queries(f"{prefix}.q_proj.weight", hidden)
        else:
            queries = self._matrix(f"{prefix}.q_a_proj.weight", (rank, hidden))
        row = self._matrix(f"{prefix}.kv_a_proj_with_mqa.weight", (self.latent.row_size, hidden))
        split = self.latent.kv_lora_rank
        return torch.cat([queries, row[:split], _halves(row[split:])])

    def attention(self, prefix: str) -> LatentAttention:
        """All but `qkv` and `output`, packed for the device."""
        latent, device = self.latent, self.ops.device
        queries = None
        if latent.q_lora_rank is not None:
            queries = NarrowQueries(
                norm_Q=self._vector(f"{prefix}.q_a_layernorm.weight", latent.q_lora_rank),
                widen=self.ops.pack_linear(
                    self._queries(f"{prefix}.q_b_proj.weight", latent.q_lora_rank).to(device)
                ),
            )  # fmt: skip
        head_rows = latent.nope_size + latent.value_size
        both_NL = self._head_rows(f"{prefix}.kv_b_proj.weight", head_rows, latent.kv_lora_rank)
        both_HNL = both_NL.view(self.heads.length, head_rows, latent.kv_lora_rank).to(device)
        keys_HUL, values_HVL = torch.split(both_HNL, [latent.nope_size, latent.value_size], dim=1)
        return LatentAttention(
            queries=queries,
            cache_norm_L=self._vector(f"{prefix}.kv_a_layernorm.weight", latent.kv_lora_rank),
            into_latent=self.ops.pack_heads(keys_HUL.transpose(1, 2).contiguous()),
            out_of_latent=self.ops.pack_heads(values_HVL.contiguous()),
        )

    def _queries(self, name: str, in_features: int) -> torch.Tensor:
        """This rank's heads, each with its rotated rows last and in halves."""
        size = self.config.head_size
        heads_HCK = self._head_rows(name, size, in_features).view(self.heads.length, size, in_features)
        turned = [
            torch.cat([head[: self.latent.nope_size], _halves(head[self.latent.nope_size :])]) for head in heads_HCK
        ]
        return torch.cat(turned)

    def _head_rows(self, name: str, head_rows: int, in_features: int) -> torch.Tensor:
        rows = Range(self.heads.start * head_rows, self.heads.stop * head_rows)
        return self._matrix(name, (self.config.num_heads * head_rows, in_features), rows)

    def _matrix(self, name: str, shape: tuple[int, int], rows: Range | None = None) -> torch.Tensor:
        rows = rows or Range(0, shape[0])
        matrix = torch.empty((rows.length, shape[1]), dtype=torch.bfloat16)
        self.copy(name, shape, rows, matrix)
        return matrix

    def _vector(self, name: str, length: int) -> torch.Tensor:
        vector = torch.empty(length, dtype=torch.float32)
        self.copy(name, (length,), Range(0, length), vector)
        return vector.to(self.ops.device)


def _halves(rows_RK: torch.Tensor) -> torch.Tensor:
    """Rows 0, 2, 4 ... and then 1, 3, 5 ..."""
    return torch.cat([rows_RK[0::2], rows_RK[1::2]])
