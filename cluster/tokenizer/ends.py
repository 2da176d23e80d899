"""What stands before and behind a prompt."""

from __future__ import annotations

from tokenizers import processors

Token = tuple[str, int]


def with_ends(bos: Token | None, eos: Token | None = None) -> processors.TemplateProcessing:
    """Adds the tokens that are given to every text with special tokens."""
    first, last = ([] if end is None else [end[0]] for end in (bos, eos))
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", "$B", *last],
        special_tokens=[end for end in (bos, eos) if end is not None],
    )
