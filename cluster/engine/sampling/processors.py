"""What changes the logits before a token is chosen, greedily or not: minimum length, bias, penalties.

In vLLM's order: min_tokens masks the stop tokens, then logit_bias, then repetition, frequency and
presence penalties. presence and frequency count output tokens (OpenAI); repetition also looks at the
prompt (CTRL, Hugging Face). NaN stays NaN, so that a broken row is noticed.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from cluster.engine.host_values import to_device
from cluster.engine.sequence import Sequence


class TokenHistory:
    """The distinct tokens of a sequence and how often each was put out; follows the sequence."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._num_seen = 0
        self._place_of: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.int64)

    def update(self, sequence: Sequence) -> None:
        """Take in the tokens that are new since the last call."""
        for position in range(self._num_seen, len(sequence.token_ids)):
            place = self._place_of.setdefault(sequence.token_ids[position], len(self._place_of))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = sequence.token_ids[position]
            self._counts[place] += position >= self._prompt_length
        self._num_seen = len(sequence.token_ids)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """(C,) distinct ids of prompt and output."""
        return self._ids[: len(self._place_of)]

    @property
    def output_counts(self) -> npt.NDArray[np.int64]:
        """(C,) parallel to `ids`."""
        return self._counts[: len(self._place_of)]


class LogitsProcessor:
    """Holds the histories of the sequences that have penalties, as long as those live. Nothing waits for the device."""

    def __init__(self) -> None:
        self._histories: WeakKeyDictionary[Sequence, TokenHistory] = WeakKeyDictionary()

    def is_needed(self, sequence: Sequence, num_output_tokens: int) -> bool:
        """`num_output_tokens`: how many the sequence has when this draw is made."""
        return bool(
            sequence.request.sampling.logit_bias
            or sequence.draws_by_history
            or (num_output_tokens < sequence.request.sampling.min_tokens and sequence.stop_token_ids)
        )

    def apply(self, logits_V: torch.Tensor, sequence: Sequence, num_output_tokens: int) -> None:
        """Change one fp32 row in place."""
        sampling = sequence.request.sampling
        if num_output_tokens < sampling.min_tokens and sequence.stop_token_ids:
            stop_ids = to_device(np.asarray(sorted(sequence.stop_token_ids), np.int64), logits_V.device)
            stop_logits = logits_V[stop_ids]
            logits_V[stop_ids] = stop_logits.masked_fill(~stop_logits.isnan(), -math.inf)
        if sampling.logit_bias:
            ids = to_device(np.asarray([token_id for token_id, _ in sampling.logit_bias], np.int64), logits_V.device)
            biases = np.asarray([bias for _, bias in sampling.logit_bias], np.float32)
            logits_V[ids] += to_device(biases, logits_V.device)
        if sequence.draws_by_history:
            self._penalise(logits_V, sequence)

    def _penalise(self, logits_V: torch.Tensor, sequence: Sequence) -> None:
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = TokenHistory(sequence.prompt_length)
        history.update(sequence)
        sampling, device = sequence.request.sampling, logits_V.device
        ids, counts = to_device(history.ids, device), to_device(history.output_counts, device)
        values = logits_V[ids]
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            values = torch.where(values > 0.0, values / penalty, values * penalty)
        values = values - counts.to(torch.float32) * sampling.frequency_penalty
        values = values - (counts > 0).to(torch.float32) * sampling.presence_penalty
        logits_V[ids] = values
