"""Reading one rank's tensors: rows of a file's tensors, one below the other, packed for the device."""

from __future__ import annotations

import torch

from cluster.engine.kernels.ops import LinearWeight, Ops
from cluster.engine.models.config import ModelConfig, WeightFormat
from cluster.engine.models.sharding_plan import ShardingPlan
from cluster.engine.models.weights import WeightSource
from cluster.engine.models.weights_fp8 import FP8_ENCODING, Part, quantize_layer, read_layer
from cluster.engine.parallel.group import ParallelGroup
from cluster.engine.parallel.sharding import Range
from cluster.errors import ModelError
from cluster.model_files.cache import Progress

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # old checkpoints store what the config says already


class RankReader:
    """Reads one rank's weights. Every tensor of the files must be used: one that is not means that
    the model computes something this decoder does not."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        ops: Ops,
        group: ParallelGroup,
        device: torch.device,
        progress: Progress,
        is_made_fp8: bool,
    ) -> None:
        self.config = config
        self.is_made_fp8 = is_made_fp8
        self.source = source
        self.ops = ops
        self.device = device
        self.progress = progress
        self.plan = ShardingPlan.of(config, group.rank, group.size)
        self.total_bytes = config.weight_bytes // group.size  # an estimate: norms and tables are not split
        self.done_bytes = 0
        self.used = {LM_HEAD} if config.tie_embeddings else set()

    def _layer_linear(self, parts: list[tuple[str, int, Range]], in_features: int) -> LinearWeight:
        """`_linear` in the model's weight format; what an FP8 checkpoint has in bf16 stays bf16."""
        encodings = {self.source.encoding(name) for name, _, _ in parts}
        fp8_parts = [Part(*part) for part in parts]
        if self.config.weight_format is not WeightFormat.BF16 and encodings == {FP8_ENCODING}:
            layer = read_layer(self._copy, fp8_parts, in_features, self.config.weight_format, self.source.path)
        elif self.config.weight_format is not WeightFormat.BF16 and FP8_ENCODING in encodings:
            raise ModelError(f"{self.source.path}: of {[name for name, _, _ in parts]} some are FP8 and some are not")
        elif self.is_made_fp8:
            weight_NK = self._fused(parts, in_features).to(self.device)
            layer = quantize_layer(weight_NK, fp8_parts, self.source.path)
        else:
            return self._linear(parts, in_features)
        return self.ops.pack_fp8(*layer)

    def _linear(self, parts: list[tuple[str, int, Range]], in_features: int) -> LinearWeight:
        """Pack rows of several (total, in_features) tensors, one below the other."""
        return self.ops.pack_linear(self._fused(parts, in_features).to(self.device))

    def _fused(self, parts: list[tuple[str, int, Range]], in_features: int) -> torch.Tensor:
        fused_NK = torch.empty((sum(rows.length for _, _, rows in parts), in_features), dtype=torch.bfloat16)
        start = 0
        for name, total, rows in parts:
            self._copy(name, (total, in_features), rows, fused_NK[start : start + rows.length])
            start += rows.length
        return fused_NK

    def _bias(self, parts: list[tuple[str, int, Range]]) -> torch.Tensor:
        fused_N = torch.empty(sum(rows.length for _, _, rows in parts), dtype=torch.float32)
        start = 0
        for name, total, rows in parts:
            self._copy(name, (total,), rows, fused_N[start : start + rows.length])
            start += rows.length
        return fused_N.to(self.device)

    def _rows(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        whole = torch.empty(shape, dtype=torch.bfloat16)
        self._copy(name, shape, Range(0, shape[0]), whole)
        return whole.to(self.device)

    def _vector(self, name: str, length: int) -> torch.Tensor:
        vector = torch.empty(length, dtype=torch.float32)
        self._copy(name, (length,), Range(0, length), vector)
        return vector.to(self.device)

    def _copy(self, name: str, shape: tuple[int, ...], rows: Range, out: torch.Tensor) -> None:
        self.source.check(name, shape)
        self.source.copy_rows(name, rows, out)
        self.used.add(name)
        self.done_bytes += out.numel() * 2
        self.progress(min(self.done_bytes, self.total_bytes), self.total_bytes)

    def _refuse_unused(self) -> None:
        first = self.config.num_layers
        beyond = tuple(f"model.layers.{first + index}." for index in range(self.config.num_prediction_layers))
        left = (name for name in self.source.names - self.used if not name.endswith(_IGNORED_SUFFIX))
        unused = sorted(name for name in left if not name.startswith(beyond))
        if unused:
            raise ModelError(
                f"{self.source.path}: {len(unused)} tensors are not part of the {self.config.architecture.value} "
                f"architecture as served here, the first is {unused[0]!r}"
            )
