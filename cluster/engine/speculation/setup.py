"""From the configuration to what guesses tokens."""

from __future__ import annotations

from cluster.engine.block_manager import BlockManager
from cluster.engine.config import SpeculationConfig
from cluster.engine.speculation.draft_kv import DraftKV
from cluster.engine.speculation.draft_model import DraftModelProposer, DraftRunner
from cluster.engine.speculation.ngram import NgramProposer
from cluster.engine.speculation.proposer import Proposer
from cluster.engine.speculation.speculator import Speculator
from cluster.errors import StartupError


def make_speculator(
    config: SpeculationConfig,
    blocks: BlockManager,
    draft_runner: DraftRunner | None,
    *,
    max_position: int,
    max_batched_tokens: int,
) -> Speculator | None:
    """None: nothing is guessed. `draft_runner` runs the draft model over a pool that mirrors `blocks`, in
    contexts of up to `max_position` tokens and steps of up to `max_batched_tokens`."""
    proposer: Proposer
    match config.method:
        case "none":
            return None
        case "ngram":
            proposer = NgramProposer(config.ngram_min, config.ngram_max)
        case "draft":
            if draft_runner is None:
                raise StartupError("engine.speculation.method is draft, and no draft model was loaded")
            proposer = DraftModelProposer(
                draft_runner, DraftKV(blocks), max_position=max_position, max_batched_tokens=max_batched_tokens
            )
    return Speculator(proposer, config.num_tokens)
