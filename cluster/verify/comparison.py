"""Where two outputs part."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.verify.model import Case, Output


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first position at which two outputs part. None: the output has ended before it."""

    case: str
    position: int
    reference_token: int | None
    other_token: int | None
    reference_bits: str | None
    other_bits: str | None


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One URL at one concurrency level, compared with the reference."""

    source: str
    concurrency: int
    num_prompts: int
    num_tokens: int
    num_mismatches: int
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    cells: tuple[Cell, ...]
    difference: Difference | None

    @property
    def is_equal(self) -> bool:
        return self.difference is None


def compare(cases: Sequence[Case], reference: Sequence[Output], other: Sequence[Output]) -> list[Difference]:
    """The first difference of each case that has one, in the order of the cases."""
    differences = []
    for case, ours, theirs in zip(cases, reference, other, strict=True):
        for position in range(max(len(ours.token_ids), len(theirs.token_ids))):
            if _at(ours, position) != _at(theirs, position):
                differences.append(_difference(case, position, ours, theirs))
                break
    return differences


def _at(output: Output, position: int) -> tuple[int, str, tuple[str, ...]] | None:
    if position >= len(output.token_ids):
        return None
    return output.token_ids[position], output.logprob_bits[position], output.top_bits[position]


def _difference(case: Case, position: int, ours: Output, theirs: Output) -> Difference:
    reference, other = _at(ours, position), _at(theirs, position)
    reference_bits, other_bits = _shown_bits(reference, other)
    return Difference(
        case=case.name,
        position=position,
        reference_token=None if reference is None else reference[0],
        other_token=None if other is None else other[0],
        reference_bits=reference_bits,
        other_bits=other_bits,
    )


def _shown_bits(
    ours: tuple[int, str, tuple[str, ...]] | None, theirs: tuple[int, str, tuple[str, ...]] | None
) -> tuple[str | None, str | None]:
    """The token's own logprob; if that is equal, the first of the alternatives that is not."""
    if ours is None or theirs is None or ours[:2] != theirs[:2]:
        return None if ours is None else ours[1], None if theirs is None else theirs[1]
    for mine, other in zip(ours[2], theirs[2], strict=False):
        if mine != other:
            return f"{mine} (alternative)", f"{other} (alternative)"
    return f"{len(ours[2])} alternatives", f"{len(theirs[2])} alternatives"
