"""Which of the tokens that a step has drawn are the sequence's next ones. Pure Python."""

from __future__ import annotations

from cluster.engine.batch import SampledToken


def accepted(drafts: tuple[int, ...], drawn: tuple[SampledToken, ...]) -> tuple[SampledToken, ...]:
    """The tokens drawn behind the longest prefix of right guesses, and the one drawn after it.

    `drawn[i]` was drawn on condition that the first i drafts are right; so it counts only if they are. A
    token that is not a number ends the sequence: nothing counts behind it.
    """
    count = 0
    for draft, token in zip(drafts, drawn, strict=False):
        if token.is_nan or token.token_id != draft:
            break
        count += 1
    return drawn[: count + 1]
