"""Answers that are streamed: one server-sent event per delta.

    data: {"id":...,"object":...,"created":...,"model":...,"choices":[ {"index":0,"delta":{"content": TEXT}, ...} ]}

Everything but TEXT is the same in every plain chunk of a choice, so it is encoded once. A chunk costs
one JSON string and one concatenation; only logprobs, token ids and usage go through structs.
"""

from __future__ import annotations

import msgspec

from cluster.router.job import Job
from cluster.router.logprobs import LogprobFormat
from cluster.router.responses import ErrorEnvelope, Usage
from cluster.router.text import Delta
from cluster.types import TokenLogprob

DONE = b"data: [DONE]\n\n"
_END = b"}\n\n"
_encode = msgspec.json.Encoder().encode


class ChunkWriter:
    """Writes the events of one HTTP answer. Holds per choice: whether it has begun, its text offset."""

    def __init__(self, job: Job, form: LogprobFormat, *, job_id: str, created: int, model: str) -> None:
        self._job = job
        self._form = form
        kind = "chat.completion.chunk" if job.is_chat else "text_completion"
        constant = _encode({"id": job_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + constant[:-1] + b',"choices":['
        self._plain_end = b',"logprobs":null,"finish_reason":null}]' + self._usage_field(None) + _END
        self._plain_starts = [
            self._head + b'{"index":%d,' % index + (b'"delta":{"content":' if job.is_chat else b'"text":')
            for index in range(job.num_choices)
        ]
        if job.is_chat:
            self._plain_end = b"}" + self._plain_end
        self._has_begun = [False] * job.num_choices
        self._text_offsets = [0] * job.num_choices

    def delta(self, choice: int, delta: Delta, usage: Usage | None) -> bytes:
        """The event of one delta; empty when it has nothing to say (text held back). `usage` is the
        choice's so far, for continuous_usage_stats."""
        if self._is_plain(choice, delta, usage):
            return self._plain_starts[choice] + _encode(delta.text) + self._plain_end if delta.text else b""
        begins = not self._has_begun[choice]
        self._has_begun[choice] = True
        body = self._chat(delta, begins) if self._job.is_chat else self._text(choice, delta, begins)
        end = b',"finish_reason":%b,"stop_reason":%b' % (
            _encode(None if delta.finish_reason is None else delta.finish_reason.value),
            _encode(delta.stop_reason),
        )
        end += self._token_ids(choice, delta, begins) + b"}]"
        if self._job.is_chat and begins and self._job.output.return_token_ids:
            end += b',"prompt_token_ids":' + _encode(self._job.prompt_of(choice).token_ids)
        return self._head + b'{"index":%d,' % choice + body + end + self._usage_field(usage) + _END

    def usage(self, usage: Usage) -> bytes:
        """The last chunk before [DONE] when include_usage was set."""
        return self._head + b'],"usage":' + _encode(usage) + _END

    def _is_plain(self, choice: int, delta: Delta, usage: Usage | None) -> bool:
        return (
            self._has_begun[choice]
            and delta.finish_reason is None
            and usage is None
            and not self._job.want_logprobs
            and not self._job.output.return_token_ids
        )

    def _chat(self, delta: Delta, begins: bool) -> bytes:
        role = b'"role":"assistant",' if begins else b""
        logprobs = self._form.chat(delta.logprobs) if self._job.want_logprobs and delta.logprobs else None
        return b'"delta":{%b"content":%b},"logprobs":%b' % (role, _encode(delta.text), _encode(logprobs))

    def _text(self, choice: int, delta: Delta, begins: bool) -> bytes:
        text, token_ids = delta.text, list(delta.token_ids)
        logprobs: list[TokenLogprob | None] = list(delta.logprobs)
        if self._job.echo and begins:
            prompt = self._job.prompt_of(choice)
            text = (prompt.text or "") + text
            token_ids = [*prompt.token_ids, *token_ids]
            logprobs = [*delta.prompt_logprobs, *logprobs]
        if not self._job.want_logprobs:
            return b'"text":%b,"logprobs":null' % _encode(text)
        legacy = self._form.legacy(token_ids, logprobs, self._text_offsets[choice])
        self._text_offsets[choice] += sum(map(len, legacy.tokens))
        return b'"text":%b,"logprobs":%b' % (_encode(text), _encode(legacy))

    def _token_ids(self, choice: int, delta: Delta, begins: bool) -> bytes:
        if not self._job.output.return_token_ids:
            return b""
        written = b',"token_ids":' + _encode(delta.token_ids)
        if begins and not self._job.is_chat:
            written += b',"prompt_token_ids":' + _encode(self._job.prompt_of(choice).token_ids)
        return written

    def _usage_field(self, usage: Usage | None) -> bytes:
        if usage is not None:
            return b',"usage":' + _encode(usage)
        return b',"usage":null' if self._job.output.include_usage else b""


def error_event(envelope: ErrorEnvelope) -> bytes:
    """Said after the headers are out; no [DONE] follows it, so it cannot pass for success."""
    return b"data: " + _encode(envelope) + b"\n\n"
