"""Which padded shapes a GPU's steps have: few, so that each can be compared, compiled and captured at start.

A step has T rows of B sequences. Rows and sequences are padded up to the next size of a list; a padding
row belongs to no sequence and stores nothing, a padding sequence has no rows. Padding never changes
bits, because rows never influence each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_FINE = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_STEP_ABOVE = ((128, 32), (256, 64), (1024, 128), (2048, 256), (4096, 512))  # above this size, in steps of that


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides which graph a step replays. `num_logits` rows of logits are wanted."""

    num_rows: int
    num_sequences: int
    num_logits: int
    num_rows_max: int  # bound of the longest query of the batch, one of `rows_class`
    has_many_splits: bool  # some context is longer than one attention split
    num_rows_min: int = 1  # 2: prompts only, no query of one row; never so in a graph
    num_prompts_max: int | None = None  # bound of the sequences of several rows, in graphs for such (`PromptShapes`)


def padded_sizes(largest: int) -> tuple[int, ...]:
    """Ascending sizes up to and with `largest`, neighbours at most a quarter apart above 64."""
    sizes = list(_FINE)
    for (start, step), (stop, _) in pairwise((*_STEP_ABOVE, (1 << 30, 0))):
        sizes.extend(range(start + step, min(stop, largest) + 1, step))
        if stop >= largest:
            break
    return (*(size for size in sizes if size < largest), largest)


def round_up(size: int, sizes: Sequence[int]) -> int:
    """The first of the ascending sizes that holds `size`."""
    return sizes[bisect_left(sizes, size)]


FEW_ROWS, MANY_ROWS = 16, 1 << 20


def rows_class(longest: int) -> int:
    """1, a few (drafts that are verified), or many: what decides how attention is computed."""
    return 1 if longest == 1 else FEW_ROWS if longest <= FEW_ROWS else MANY_ROWS
