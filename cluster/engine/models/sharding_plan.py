"""Which columns of each layer, and which experts, a rank holds, for one model and one number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.models.config import ModelConfig
from cluster.engine.parallel.sharding import HeadShard, Range, split_columns, split_heads
from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """This rank's ranges, and the widths of all ranks for the gathers."""

    heads: HeadShard
    hidden: Range
    ffn: Range
    vocab: Range
    shared: Range  # of the network of shared experts; empty if there is none
    experts: Range  # whole experts; empty in a dense model
    attention_widths: tuple[int, ...]
    hidden_widths: tuple[int, ...]
    ffn_widths: tuple[int, ...]
    vocab_widths: tuple[int, ...]
    shared_widths: tuple[int, ...]
    expert_counts: tuple[int, ...]

    @staticmethod
    def of(config: ModelConfig, rank: int, size: int) -> ShardingPlan:
        """Raises `ConfigError` if `size` ranks cannot share the attention heads or the experts."""
        heads = [split_heads(config.num_heads, config.num_kv_heads, r, size) for r in range(size)]
        hidden = [split_columns(config.hidden_size, r, size) for r in range(size)]
        ffn = [split_columns(config.ffn_size, r, size) for r in range(size)]
        vocab = [split_columns(config.vocab_size, r, size) for r in range(size)]
        shared = [_split_shared(config, r, size) for r in range(size)]
        experts = [_split_experts(config, r, size) for r in range(size)]
        return ShardingPlan(
            heads=heads[rank],
            hidden=hidden[rank],
            ffn=ffn[rank],
            vocab=vocab[rank],
            shared=shared[rank],
            experts=experts[rank],
            attention_widths=tuple(shard.query.length * config.value_size for shard in heads),
            hidden_widths=tuple(part.length for part in hidden),
            ffn_widths=tuple(part.length for part in ffn),
            vocab_widths=tuple(part.length for part in vocab),
            shared_widths=tuple(part.length for part in shared),
            expert_counts=tuple(part.length for part in experts),
        )


def _split_shared(config: ModelConfig, rank: int, size: int) -> Range:
    if config.experts is None or config.experts.num_shared == 0:
        return Range(0, 0)
    return split_columns(config.experts.num_shared * config.experts.ffn_size, rank, size)


def _split_experts(config: ModelConfig, rank: int, size: int) -> Range:
    if config.experts is None:
        return Range(0, 0)
    total = config.experts.num_experts
    if size > total:
        raise ConfigError(f"{size} ranks cannot share {total} experts: the size must not exceed their number")
    return Range(total * rank // size, total * (rank + 1) // size)
