"""What each route does, between a checked HTTP request and its reply."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from importlib import metadata
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded, TandemError, UnknownModel
from cluster.logs import log_event
from cluster.router.admission import Admission
from cluster.router.asgi import Reply, header, race_disconnect, read_body
from cluster.router.config import RouterConfig
from cluster.router.flow import Flow
from cluster.router.generation import Generation
from cluster.router.job import Job, Prompt, chat_job, check_prompt_ids, completion_job
from cluster.router.metrics import RouterMetrics
from cluster.router.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_supported,
    decode_body,
    plain_messages,
)
from cluster.router.pool import WorkerPool
from cluster.router.text import Codec, TextService
from cluster.types import WorkerInfo

log = logging.getLogger(__name__)

MAX_SESSION_BYTES = 256
MAX_COUNTED_TOKENS = 1 << 20  # of a text that is only tokenised: longer than any context, and its answer is sent
PROMETHEUS_TYPE = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")

_Body = TypeVar("_Body", bound=msgspec.Struct)


class Endpoints:
    """The router's state, and one method per route. Owns the pool and the tokeniser threads."""

    def __init__(self, config: RouterConfig, codec: Codec, pool: WorkerPool) -> None:
        self.config = config
        self.pool = pool
        self.text = TextService(codec)
        self.metrics = RouterMetrics(config.model_name, pool)
        self.admission = Admission(
            max_sequences=config.max_running_requests, max_sequences_per_request=config.max_sequences_per_request
        )
        self._flow = Flow(pool, self.metrics, max_attempts=config.max_attempts, failover_wait_s=config.failover_wait_s)
        self._started_at = int(time.time())

    async def close(self) -> None:
        self.text.close()
        await self.pool.close()

    async def chat(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        request = await self._body(scope, receive, reply, ChatRequest)
        check_supported(request)
        self._check_model(request.model)
        messages = plain_messages(request.messages)
        with self.admission.running(request.n or 1):
            limits = self.pool.limits()

            async def prepare() -> Job:
                try:
                    token_ids = await self.text.encode_chat(
                        messages,
                        add_generation_prompt=request.add_generation_prompt is not False,
                        add_special_tokens=bool(request.add_special_tokens),
                        variables=request.chat_template_kwargs,
                        max_tokens=limits.max_model_len,
                    )
                except ContextTooLong as error:
                    raise ContextTooLong(error.message, param="messages") from error
                check_prompt_ids(token_ids, limits, param="messages")
                return chat_job(request, Prompt(token_ids), limits)

            await self._generate(scope, receive, reply, "chatcmpl", prepare)

    async def complete(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        request = await self._body(scope, receive, reply, CompletionRequest)
        check_supported(request)
        self._check_model(request.model)
        prompts = split_prompts(request.prompt)
        n = request.n or 1
        with self.admission.running(len(prompts) * n, "n" if n > 1 else "prompt"):
            limits = self.pool.limits()

            async def prepare() -> Job:
                encoded = [await self._prompt(prompt, request, limits) for prompt in prompts]
                return completion_job(request, tuple(encoded), limits)

            await self._generate(scope, receive, reply, "cmpl", prepare)

    async def models(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        await reply.json({"object": "list", "data": [self._model_card()]})

    async def model(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        self._check_model(scope["path_params"]["model"])
        await reply.json(self._model_card())

    async def health(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        if self.admission.is_draining:
            raise Overloaded("this router is shutting down")
        if not self.pool.is_ready:
            raise Overloaded(self.pool.why_not_ready())
        await reply.json({"status": "ok"})

    async def metrics_page(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        await reply.whole(self.metrics.render(), 200, (PROMETHEUS_TYPE,))

    async def version(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        await reply.json({"version": own_version()})

    async def load(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        """vLLM's `server_load`, and what runs where."""
        workers = {worker.name: worker.num_in_flight for worker in self.pool.workers}
        await reply.json({"server_load": self.admission.num_sequences, "workers": workers})

    async def tokenize(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        request = await self._body(scope, receive, reply, TokenizeRequest)
        self._check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("exactly one of prompt and messages must be given", param="prompt")

        async def work() -> None:
            if request.prompt is not None:
                token_ids = await self.text.encode(
                    request.prompt,
                    add_special_tokens=request.add_special_tokens is not False,
                    max_tokens=MAX_COUNTED_TOKENS,
                )
            else:
                token_ids = await self.text.encode_chat(
                    plain_messages(request.messages or []),
                    add_generation_prompt=request.add_generation_prompt is not False,
                    add_special_tokens=bool(request.add_special_tokens),
                    variables=None,
                    max_tokens=MAX_COUNTED_TOKENS,
                )
            codec = self.text.codec
            names = [codec.token_text(token_id) for token_id in token_ids] if request.return_token_strs else None
            await reply.json(
                {
                    "count": len(token_ids),
                    "max_model_len": self._max_model_len(),
                    "tokens": token_ids,
                    "token_strs": names,
                }
            )

        with self.admission.running(1):
            await self._while_wanted(receive, reply, work())

    async def detokenize(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        request = await self._body(scope, receive, reply, DetokenizeRequest)
        self._check_model(request.model)
        if any(not 0 <= token_id < 1 << 31 for token_id in request.tokens):
            raise InvalidRequest("tokens must be non-negative 31-bit numbers", param="tokens")

        async def work() -> None:
            await reply.json({"prompt": await self.text.decode(request.tokens)})

        with self.admission.running(1):
            await self._while_wanted(receive, reply, work())

    async def _while_wanted(self, receive: Receive, reply: Reply, work: Coroutine[Any, Any, None]) -> None:
        """Within the time that a request has, and not for a client that has left."""
        timeout_s, write_timeout_s = self.config.request_timeout_s, self.config.write_timeout_s
        await race_disconnect(receive, reply, work, timeout_s=timeout_s, write_timeout_s=write_timeout_s)

    async def _body(self, scope: Scope, receive: Receive, reply: Reply, kind: type[_Body]) -> _Body:
        with self.admission.reading():
            reply.has_begun_to_read = True
            body = await read_body(
                scope, receive, max_bytes=self.config.max_body_bytes, timeout_s=self.config.body_timeout_s
            )
        reply.closes_connection = False
        return decode_body(body, kind)

    async def _generate(
        self, scope: Scope, receive: Receive, reply: Reply, prefix: str, prepare: Callable[[], Awaitable[Job]]
    ) -> None:
        """Tokenise, run, answer; the client may leave at any point of it."""
        job_id = f"{prefix}-{secrets.token_hex(16)}"
        log_event(log, logging.INFO, "request accepted", request=job_id, client_request_id=reply.request_id)

        async def work() -> None:
            generation = Generation(
                await prepare(),
                job_id,
                flow=self._flow,
                codec=self.text.codec,
                metrics=self.metrics,
                model=self.config.model_name,
                session=_session(scope),
            )
            await generation.run(reply, timeout_s=self.config.request_timeout_s)

        try:
            await self._while_wanted(receive, reply, work())
        except TandemError as error:
            log_event(log, logging.INFO, "request failed", request=job_id, code=error.code, message=error.message)
            raise

    async def _prompt(self, prompt: str | tuple[int, ...], request: CompletionRequest, limits: WorkerInfo) -> Prompt:
        if isinstance(prompt, str):
            try:
                token_ids = await self.text.encode(
                    prompt, add_special_tokens=request.add_special_tokens is not False, max_tokens=limits.max_model_len
                )
            except ContextTooLong as error:
                raise ContextTooLong(error.message, param="prompt") from error
            check_prompt_ids(token_ids, limits)
            return Prompt(token_ids, prompt)
        check_prompt_ids(prompt, limits)
        # One that is too long was not checked, is refused later, and need not be read.
        is_read = bool(request.echo) and len(prompt) < limits.max_model_len
        return Prompt(prompt, await self.text.decode(prompt) if is_read else None)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.model_name:
            message = f"the model {name[:256]!r} is not served here; served is {self.config.model_name!r}"
            raise UnknownModel(message, param="model")

    def _model_card(self) -> dict[str, str | int | None]:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "tandem",
            "root": self.config.model_name,
            "parent": None,
            "max_model_len": self._max_model_len(),
        }

    def _max_model_len(self) -> int | None:
        """None until a worker has introduced itself."""
        infos = [worker.connection.info for worker in self.pool.workers]
        return min((info.max_model_len for info in infos if info is not None), default=None)


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    """The four forms of OpenAI's `prompt` as a list of texts or of token id tuples."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if all(isinstance(item, int) for item in prompt):
        return [tuple(item for item in prompt if isinstance(item, int))]
    if all(isinstance(item, str) for item in prompt):
        return [item for item in prompt if isinstance(item, str)]
    if all(isinstance(item, list) for item in prompt):
        return [tuple(item) for item in prompt if isinstance(item, list)]
    raise InvalidRequest("prompt must hold texts, token ids or lists of token ids, not a mixture", param="prompt")


def own_version() -> str:
    try:
        return metadata.version("tandem-serving")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0+source"


def _session(scope: Scope) -> str:
    value = header(scope, b"x-session-affinity")
    return "" if value is None else value[:MAX_SESSION_BYTES].decode("latin-1")
