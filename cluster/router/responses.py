"""Answers that are sent whole: completions, chat completions, models, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded, TandemError, UnknownModel
from cluster.router.job import Job
from cluster.router.logprobs import ChatLogprobs, LegacyLogprobs, LogprobFormat, PromptLogprob
from cluster.router.recovery import kind_of
from cluster.router.text import Delta
from cluster.types import FinishReason, TokenLogprob


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Message(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: Sequence[int] | UnsetType = UNSET


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[TextChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(msgspec.Struct, frozen=True):
    error: ErrorBody


@dataclass(slots=True)
class Answer:
    """One choice, growing delta by delta."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason = FinishReason.LENGTH
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


def usage_of(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> Usage:
    return Usage(
        num_prompt_tokens,
        num_completion_tokens,
        num_prompt_tokens + num_completion_tokens,
        PromptTokensDetails(num_cached_tokens),
    )


def completion(
    job: Job, answers: Sequence[Answer], form: LogprobFormat, *, job_id: str, created: int, model: str, usage: Usage
) -> Completion:
    if not job.is_chat:
        return Completion(
            id=job_id,
            object="text_completion",
            created=created,
            model=model,
            choices=[text_choice(job, index, answer, form) for index, answer in enumerate(answers)],
            usage=usage,
        )
    first = answers[0]
    return Completion(
        id=job_id,
        object="chat.completion",
        created=created,
        model=model,
        choices=[chat_choice(job, index, answer, form) for index, answer in enumerate(answers)],
        usage=usage,
        prompt_logprobs=form.prompt(first.prompt_logprobs) if job.wants_prompt_logprobs else UNSET,
        prompt_token_ids=job.prompts[0].token_ids if job.output.return_token_ids else UNSET,
    )


def chat_choice(job: Job, index: int, answer: Answer, form: LogprobFormat) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=Message(answer.text),
        logprobs=form.chat(answer.logprobs) if job.want_logprobs else None,
        finish_reason=answer.finish_reason.value,
        stop_reason=answer.stop_reason,
        token_ids=answer.token_ids if job.output.return_token_ids else UNSET,
    )


def text_choice(job: Job, index: int, answer: Answer, form: LogprobFormat) -> TextChoice:
    prompt = job.prompt_of(index)
    token_ids, logprobs = list(answer.token_ids), list[TokenLogprob | None](answer.logprobs)
    if job.echo:
        token_ids, logprobs = [*prompt.token_ids, *token_ids], [*answer.prompt_logprobs, *logprobs]
    return TextChoice(
        index=index,
        text=(prompt.text or "") + answer.text if job.echo else answer.text,
        logprobs=form.legacy(token_ids, logprobs, 0) if job.want_logprobs else None,
        finish_reason=answer.finish_reason.value,
        stop_reason=answer.stop_reason,
        prompt_logprobs=form.prompt(answer.prompt_logprobs) if job.wants_prompt_logprobs else UNSET,
        prompt_token_ids=prompt.token_ids if job.output.return_token_ids else UNSET,
        token_ids=answer.token_ids if job.output.return_token_ids else UNSET,
    )


def error_envelope(error: TandemError) -> tuple[int, ErrorEnvelope]:
    """HTTP status and body of a failure, in OpenAI's words where it has some."""
    kind = kind_of(error)
    status = kind.http_status
    if issubclass(kind, ContextTooLong):
        code = "context_length_exceeded"
    elif issubclass(kind, UnknownModel):
        code = "model_not_found"
    else:
        code = kind.code
    kind_name = "invalid_request_error" if status < 500 else "server_error"
    if issubclass(kind, Overloaded):
        kind_name = "overloaded_error"
    param = error.param if isinstance(error, InvalidRequest) else None
    return status, ErrorEnvelope(ErrorBody(error.message, kind_name, param, code))
