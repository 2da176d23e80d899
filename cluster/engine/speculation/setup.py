"""From the configuration to what guesses tokens."""

from __future__ import annotations

from cluster.engine.config import SpeculationConfig
from cluster.engine.speculation.ngram import NgramProposer
from cluster.engine.speculation.speculator import Speculator


def make_speculator(config: SpeculationConfig) -> Speculator | None:
    """None: nothing is guessed."""
    match config.method:
        case "none":
            return None
        case "ngram":
            return Speculator(NgramProposer(config.ngram_min, config.ngram_max), config.num_tokens)
