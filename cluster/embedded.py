"""The engine inside the calling process: no server, no thread, no socket (`from cluster import LLM`).

    with LLM("demo") as llm:
        for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, seed=0)):
            print(completion.text)

For jobs that run the same program on every rank: each rank owns one engine and gives it the same prompts.
The numerics contract makes the answers equal, to the bit, on all ranks and to those of a served deployment
of the same model and kernels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

import msgspec
import torch

from cluster.control.messages import Cancel, Submit
from cluster.control.process import load_worker
from cluster.control.worker_config import WorkerConfig
from cluster.engine.config import EngineConfig
from cluster.errors import error_class_of
from cluster.tokenizer import Tokenizer
from cluster.types import FinishReason, Request, SamplingParams, TokenChunk, TokenLogprob
from decode.worker import DecodeParts


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one prompt. `logprobs` is parallel to `token_ids`, empty if none were asked for."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


class LLM:
    """A model and its engine. Owns their memory until `close`, or the end of the `with` block."""

    def __init__(
        self,
        model: str = "demo",
        *,
        engine: EngineConfig | None = None,
        quantization: Literal["fp8"] | None = None,
        residual_dtype: Literal["bfloat16", "float32"] | None = None,
    ) -> None:
        """`model`: `demo`, a directory, a .gguf file or a Hugging Face id; `quantization` makes FP8 of a bf16
        one, `residual_dtype` is that of a GPU (`model.residual_dtype`). Blocks while it loads; raises errors of our
        tree."""
        config = WorkerConfig(
            model=model,
            engine=engine or EngineConfig(),
            model_quantization=quantization,
            model_residual_dtype=residual_dtype,
            transport="loopback",
        )
        self._tokenizer = Tokenizer.load(model)
        with _torch_threads_kept():
            worker = load_worker(config, DecodeParts())
        self._driver = worker.driver
        self._vocab_size = worker.info.vocab_size
        self._num_requests = 0
        self._is_closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams) -> list[Completion]:
        """Complete all prompts together, in their order; a text is tokenized, token ids are taken as they are.

        Raises `TypeError` for what is no list of prompts, `ValueError` for `sampling.stop` (texts are matched by the
        router only), and the error of the first prompt that could not be completed; nothing of this call runs any
        more then.
        """
        if self._is_closed:
            raise ValueError("this LLM was closed")
        if not isinstance(sampling, SamplingParams):
            raise TypeError(f"sampling: one SamplingParams for all prompts, got {type(sampling).__name__}")
        if isinstance(prompts, str) or not all(isinstance(each, Sequence) for each in prompts):
            raise TypeError("prompts: a list, each item a text or a list of token ids")
        if sampling.stop:
            raise ValueError("sampling.stop: stop strings are not matched here, use stop_token_ids")
        sampling.check(self._vocab_size)
        requests = [self._request(prompt, sampling) for prompt in prompts]
        try:
            for request in requests:
                self._driver.handle(Submit(request, None), time.monotonic())
            answers = self._run(requests)
        except BaseException:  # also Ctrl-C: the next call must not meet the rest of this one
            for request in requests:
                self._driver.handle(Cancel(request.request_id, request.attempt), time.monotonic())
            raise
        return [self._completion(request, answers[request.request_id]) for request in requests]

    def close(self) -> None:
        """Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._driver.close()
            del self._driver, self._tokenizer

    def _request(self, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self._num_requests += 1
        return Request(request_id=f"embedded-{self._num_requests}", token_ids=tuple(token_ids), sampling=sampling)

    def _run(self, requests: Sequence[Request]) -> dict[str, list[TokenChunk]]:
        """Every request ends within a bounded number of steps: max_tokens bounds it."""
        answers: dict[str, list[TokenChunk]] = {request.request_id: [] for request in requests}
        num_running = len(requests)
        while num_running:
            news = self._driver.turn(time.monotonic())
            for event in () if news is None else news.events:
                assert isinstance(event, TokenChunk), "a decode engine sends chunks only"
                if event.request_id in answers:  # else it was cancelled with an earlier call
                    answers[event.request_id].append(event)
                    num_running -= event.finish_reason is not None
        return answers

    def _completion(self, request: Request, chunks: Sequence[TokenChunk]) -> Completion:
        last = chunks[-1]
        assert last.finish_reason is not None
        if last.error is not None:
            raise error_class_of(last.error.code)(last.error.message)
        token_ids = tuple(token for chunk in chunks for token in chunk.token_ids)
        # The token that stopped it is among the ids and not in the text, as in an answer over HTTP.
        shown = token_ids[:-1] if last.finish_reason is FinishReason.STOP else token_ids
        return Completion(
            prompt_token_ids=request.token_ids,
            token_ids=token_ids,
            text=self._tokenizer.decode(shown),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            finish_reason=last.finish_reason,
        )


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """A worker process takes torch's threads away, for the kernels bring their own; here torch is the caller's."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
