"""The draft model of a worker that speculates with one: found, compared with the target, loaded."""

from __future__ import annotations

from itertools import zip_longest

import torch

from cluster.engine.config import EngineConfig
from cluster.engine.kernels.ops import Ops
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import LoadedModel, load_model
from cluster.engine.parallel.group import SingleRank
from cluster.errors import ModelError
from cluster.model_files.source import ModelSource, resolve_model
from cluster.process_events import ShowProgress
from cluster.tokenizer import Tokenizer

FIELD = "engine.speculation.draft_model"


def load_draft_model(
    config: EngineConfig, target_source: ModelSource, target: LoadedModel, ops: Ops, show: ShowProgress
) -> DecoderModel | None:
    """None unless `config.speculation` asks for one. `ModelError` if its tokens are not the target's."""
    path = config.speculation.draft_model
    if config.speculation.method != "draft" or path is None:
        return None
    source = resolve_model(path, lambda done, total: show("fetching the draft model", done, total))
    check_vocabularies(Tokenizer.load(target_source), Tokenizer.load(source))
    draft = load_model(
        source,
        ops,
        SingleRank(),
        torch.device(config.device),
        max_position=config.max_model_len,
        progress=lambda done, total: show("loading the draft model", done, total),
        hashing=lambda done, total: show("hashing the draft model", done, total),
    )
    if draft.config.vocab_size != target.config.vocab_size:
        raise ModelError(
            f"{FIELD}: {source.name} has {draft.config.vocab_size} token ids, {target_source.name} has "
            f"{target.config.vocab_size}; a draft model must have the vocabulary of the model it guesses for"
        )
    return draft.model


def check_vocabularies(target: Tokenizer, draft: Tokenizer) -> None:
    """Every token id must have one name in both."""
    ours, theirs = _names(target), _names(draft)
    for token_id, (our_name, their_name) in enumerate(zip_longest(ours, theirs)):
        if our_name != their_name:
            raise ModelError(
                f"{FIELD}: token {token_id} is {their_name!r} in {draft.source.name} and {our_name!r} in "
                f"{target.source.name}; a draft model must have the vocabulary of the model it guesses for"
            )


def _names(tokenizer: Tokenizer) -> list[str | None]:
    """By token id; None where an id has no token."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    names: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for name, token_id in vocabulary.items():
        names[token_id] = name
    return names
