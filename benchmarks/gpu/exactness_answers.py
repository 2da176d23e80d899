"""What is compared of a request, and how its logits are seen inside a runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from cluster.engine.gpu.draws import Draws
from cluster.engine.gpu.graphs import StepOutput
from cluster.engine.gpu.runner import GpuModelRunner
from cluster.engine.gpu.sampler import DrawnRows
from cluster.engine.gpu.shapes import StepShape
from cluster.types import TokenChunk


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    logits: dict[int, int] = field(default_factory=dict)  # position of the drawn token -> digest
    kv: int | None = None

    def differences(self, other: Answer) -> list[str]:
        return [name for name in ("tokens", "logprobs", "logits", "kv") if getattr(self, name) != getattr(other, name)]


def take(answers: dict[str, Answer], chunk: TokenChunk) -> None:
    """A chunk of a request that is compared; others are passed over."""
    assert chunk.error is None, chunk.error
    answer = answers.get(chunk.request_id)
    if answer is None:
        return
    assert chunk.index == len(answer.tokens)
    answer.tokens.extend(chunk.token_ids)
    answer.logprobs.extend(chunk.prompt_logprobs)
    answer.logprobs.extend(chunk.logprobs)


class LogitsWatch:
    """Digests the logits of every drawn row, from inside the runner. `most_rows`: of which tokens were drawn in one
    step, of a graph if the runner has any."""

    def __init__(self, runner: GpuModelRunner, answers: dict[str, Answer], key: Callable[[int], torch.Tensor]) -> None:
        self._runner, self._answers, self._key = runner, answers, key
        self._plain = runner._sample
        self._found: list[tuple[list[tuple[str, int]], torch.Tensor]] = []
        self.most_rows = 0
        self._graphs = runner._graphs
        self._counts = self._graphs is None  # the step whose logits come next

    def __enter__(self) -> Self:
        self._runner._sample = self._sample  # type: ignore[method-assign]
        if self._graphs is not None:
            self._plain_replay = self._graphs.replay
            self._graphs.replay = self._replay  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self._runner._sample  # the class's own again; a kept method would tie the runner and its pool to itself
        if self._graphs is not None:
            del self._graphs.replay
        for rows, digests in self._found:
            for (request_id, position), digest in zip(rows, digests.tolist(), strict=True):
                if request_id in self._answers:
                    self._answers[request_id].logits[position] = digest

    def _sample(self, output: StepOutput, draws: Draws) -> DrawnRows:
        logits_RV = output.logits_RV[: len(draws)]
        digests = torch.stack([(row.view(torch.int32).long() * self._key(len(row))).sum() for row in logits_RV])
        names = [sequence.request.request_id for sequence in draws.asked.sequences]
        rows = list(zip(names, draws.positions.tolist(), strict=True))
        if self._counts:
            self.most_rows = max(self.most_rows, len(rows))
        self._counts = self._graphs is None
        self._found.append((rows, digests))
        return self._plain(output, draws)

    def _replay(self, shape: StepShape) -> StepOutput | None:
        output = self._plain_replay(shape)
        self._counts = output is not None
        return output
