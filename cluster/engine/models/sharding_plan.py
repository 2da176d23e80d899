"""Which columns of each layer a rank holds, for one model and one number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.models.config import ModelConfig
from cluster.engine.parallel.sharding import HeadShard, Range, split_columns, split_heads


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """This rank's ranges, and the widths of all ranks for the gathers."""

    heads: HeadShard
    hidden: Range
    ffn: Range
    vocab: Range
    attention_widths: tuple[int, ...]
    hidden_widths: tuple[int, ...]
    ffn_widths: tuple[int, ...]
    vocab_widths: tuple[int, ...]

    @staticmethod
    def of(config: ModelConfig, rank: int, size: int) -> ShardingPlan:
        """Raises `ConfigError` if `size` ranks cannot share the attention heads."""
        heads = [split_heads(config.num_heads, config.num_kv_heads, r, size) for r in range(size)]
        hidden = [split_columns(config.hidden_size, r, size) for r in range(size)]
        ffn = [split_columns(config.ffn_size, r, size) for r in range(size)]
        vocab = [split_columns(config.vocab_size, r, size) for r in range(size)]
        return ShardingPlan(
            heads=heads[rank],
            hidden=hidden[rank],
            ffn=ffn[rank],
            vocab=vocab[rank],
            attention_widths=tuple(shard.query.length * config.head_size for shard in heads),
            hidden_widths=tuple(part.length for part in hidden),
            ffn_widths=tuple(part.length for part in ffn),
            vocab_widths=tuple(part.length for part in vocab),
        )
