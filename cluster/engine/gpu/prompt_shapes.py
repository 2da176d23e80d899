"""Shapes of the steps with prompts that are graphs: few of them, each for any composition that fits.

A step of prompt chunks and decoding sequences differs from every other one, so its shape bounds it: rows,
sequences, and sequences of several rows, for which attention has tiles. Contexts are bounded by the longest that
can be, whatever they are: a context of one attention split has the same bits among longer ones. Logits are not
part of a graph, so their number is not part of what finds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from cluster.engine.gpu.shapes import MANY_ROWS, StepShape, round_up

FEW_SEQUENCES = 32  # a graph for more has as many sequences as a step can have: empty ones cost little
MOST_PROMPTS = 32  # sequences of several rows: each may have one tile that is not full
_ROW_MULTIPLE = 16  # smaller steps are padded further: they cost what reading the weights costs


class PromptShapes:
    """Of steps with at most `max_rows` rows, at least 1."""

    def __init__(
        self, max_rows: int, row_sizes: Sequence[int], sequence_sizes: Sequence[int], *, has_many_splits: bool
    ) -> None:
        """The sizes are those of all steps, ascending. `has_many_splits`: a context can be longer than one."""
        self._max_rows = min(max_rows, row_sizes[-1])
        largest = round_up(self._max_rows, row_sizes)
        self._row_sizes = (*(size for size in row_sizes if size < largest and size % _ROW_MULTIPLE == 0), largest)
        self._logit_sizes = row_sizes
        most = sequence_sizes[-1]
        self._sequence_sizes = tuple(sorted({round_up(min(FEW_SEQUENCES, most), sequence_sizes), most}))
        self._has_many_splits = has_many_splits

    def of(self, num_rows: int, num_sequences: int, num_prompts: int, num_logits: int) -> StepShape | None:
        """The smallest that holds a step with `num_prompts` sequences of several rows; None: the step is no graph."""
        if num_rows > self._max_rows:
            return None
        shape = self._shape(round_up(num_rows, self._row_sizes), round_up(num_sequences, self._sequence_sizes))
        assert shape.num_prompts_max is not None
        if num_prompts > shape.num_prompts_max:
            return None
        return replace(shape, num_logits=round_up(num_logits, self._logit_sizes))

    def __iter__(self) -> Iterator[StepShape]:
        """All, the largest first, without logits: what finds a graph."""
        for num_rows in reversed(self._row_sizes):
            for fewer, num_sequences in reversed(list(pairwise((0, *self._sequence_sizes)))):
                if fewer + 1 < num_rows:  # one of the sequences has two rows at least
                    yield self._shape(num_rows, num_sequences)

    def _shape(self, num_rows: int, num_sequences: int) -> StepShape:
        return StepShape(
            num_rows,
            num_sequences,
            0,
            MANY_ROWS,
            self._has_many_splits,
            num_prompts_max=min(num_sequences, MOST_PROMPTS),
        )
