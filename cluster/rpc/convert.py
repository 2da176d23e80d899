"""Structs of `cluster/types.py` to and from protobuf. The only code that knows both.

`*_from_pb` is given what a peer sent: whatever it holds, the answer is a well-formed struct or
`InvalidRequest` naming the field. Sizes of whole messages are bounded before they get here
(`limits.py`); ranges that depend on the model (vocabulary, context) are checked by the worker.
"""

from __future__ import annotations

from cluster.errors import InvalidRequest
from cluster.rpc.base import Inspection
from cluster.rpc.pb.serving.v1 import common_pb2 as pb
from cluster.rpc.pb.serving.v1 import worker_pb2
from cluster.types import (
    FinishReason,
    HistogramReading,
    PrefillResult,
    PrefillStarted,
    Request,
    RequestError,
    Role,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    WorkerInfo,
    WorkerLoad,
)

MAX_ID_LENGTH = 128
MAX_TENANT_LENGTH = 256
MAX_SALT_BYTES = 64
MAX_HISTOGRAMS = 64
MAX_HISTOGRAM_BOUNDS = 128
MAX_DRAFT_POSITIONS = 128

_FINISH_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_PB = {number: reason for reason, number in _FINISH_TO_PB.items()}
_ROLE_TO_PB = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_ROLE_FROM_PB = {number: role for role, number in _ROLE_TO_PB.items()}
_LOAD_NOT_NUMBERS = ("histograms", "spec_accepted_per_position")
_LOAD_NUMBERS = tuple(name for name in WorkerLoad.__struct_fields__ if name not in _LOAD_NOT_NUMBERS)


def sampling_to_pb(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias_ids=[token_id for token_id, _ in sampling.logit_bias],
        logit_bias_values=[bias for _, bias in sampling.logit_bias],
        stop_token_ids=sampling.stop_token_ids,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    if len(message.logit_bias_ids) != len(message.logit_bias_values):
        raise InvalidRequest("logit_bias has ids and values of different lengths", param="logit_bias")
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(zip(message.logit_bias_ids, message.logit_bias_values, strict=True)),
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def request_to_pb(request: Request) -> pb.Request:
    return pb.Request(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=request.token_ids,
        sampling=sampling_to_pb(request.sampling),
        num_prompt_tokens=request.num_prompt_tokens,
        deadline_s=request.deadline_s,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        traceparent=request.traceparent,
    )


def request_from_pb(message: pb.Request) -> Request:
    """Raises `InvalidRequest` when a field that everything else relies on is missing or too long."""
    _length("request_id", message.request_id, 1, MAX_ID_LENGTH)
    _length("token_ids", message.token_ids, 1, None)
    _length("tenant", message.tenant, 0, MAX_TENANT_LENGTH)
    _length("cache_salt", message.cache_salt, 0, MAX_SALT_BYTES)
    _length("traceparent", message.traceparent, 0, MAX_ID_LENGTH)
    if not message.HasField("sampling"):
        raise InvalidRequest("sampling is missing", param="sampling")
    if message.num_prompt_tokens > len(message.token_ids):
        raise InvalidRequest(
            f"num_prompt_tokens is {message.num_prompt_tokens}, but there are {len(message.token_ids)} tokens",
            param="num_prompt_tokens",
        )
    return Request(
        request_id=message.request_id,
        attempt=message.attempt,
        token_ids=tuple(message.token_ids),
        sampling=sampling_from_pb(message.sampling),
        num_prompt_tokens=message.num_prompt_tokens,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        traceparent=message.traceparent,
    )


def _length(field: str, value: object, low: int, high: int | None) -> None:
    size = len(value)  # type: ignore[arg-type]  # str, bytes and protobuf's containers share no base
    if size < low or (high is not None and size > high):
        limit = "at least 1" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{field} must have a length of {limit}, got {size}", param=field)


def logprob_to_pb(logprob: TokenLogprob | None) -> pb.TokenLogprob:
    """None (a prompt's first token has no probability) is rank 0, which no token has."""
    if logprob is None:
        return pb.TokenLogprob()
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top_ids=[token_id for token_id, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )


def logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob | None:
    if message.rank == 0:
        return None
    if len(message.top_ids) != len(message.top_logprobs):
        raise InvalidRequest("top_ids and top_logprobs have different lengths", param="top_logprobs")
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprob(message.token_id, message.logprob, message.rank, top)


def chunk_to_pb(chunk: TokenChunk) -> pb.TokenChunk:
    message = pb.TokenChunk()
    fill_chunk(message, chunk)
    return message


def fill_chunk(message: pb.TokenChunk, chunk: TokenChunk) -> None:
    """Into an empty message, field by field and only what is set: a worker does this for each token of each
    request, and a message that is made first and then copied into its frame takes four times as long."""
    message.request_id = chunk.request_id
    message.index = chunk.index
    message.token_ids.extend(chunk.token_ids)
    if chunk.attempt:
        message.attempt = chunk.attempt
    if chunk.logprobs:
        message.logprobs.extend(map(logprob_to_pb, chunk.logprobs))
    if chunk.finish_reason is not None:
        message.finish_reason = _FINISH_TO_PB[chunk.finish_reason]
    if chunk.stop_token_id is not None:
        message.stop_token_id = chunk.stop_token_id
    if chunk.error is not None:
        message.error.code, message.error.message = chunk.error.code, chunk.error.message
        message.error.SetInParent()  # an error without a text is one, too
    if chunk.num_cached_tokens:
        message.num_cached_tokens = chunk.num_cached_tokens
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(map(logprob_to_pb, chunk.prompt_logprobs))


def chunk_from_pb(message: pb.TokenChunk) -> TokenChunk:
    error = message.error
    logprobs = tuple(logprob for entry in message.logprobs if (logprob := logprob_from_pb(entry)) is not None)
    if logprobs and len(logprobs) != len(message.token_ids):
        raise InvalidRequest("logprobs is not parallel to token_ids", param="logprobs")
    if message.finish_reason not in _FINISH_FROM_PB:
        raise InvalidRequest(f"finish_reason {message.finish_reason} is unknown", param="finish_reason")
    return TokenChunk(
        request_id=message.request_id,
        attempt=message.attempt,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs,
        finish_reason=_FINISH_FROM_PB[message.finish_reason],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=RequestError(code=error.code, message=error.message) if message.HasField("error") else None,
        num_cached_tokens=message.num_cached_tokens,
        prompt_logprobs=tuple(logprob_from_pb(entry) for entry in message.prompt_logprobs),
    )


def started_to_pb(started: PrefillStarted) -> pb.PrefillStarted:
    return pb.PrefillStarted(request_id=started.request_id, attempt=started.attempt, kv=started.kv)


def started_from_pb(message: pb.PrefillStarted) -> PrefillStarted:
    return PrefillStarted(request_id=message.request_id, attempt=message.attempt, kv=message.kv)


def result_to_pb(result: PrefillResult) -> pb.PrefillResult:
    return pb.PrefillResult(
        first=chunk_to_pb(result.first),
        kv=result.kv,
        prompt_logprobs=[logprob_to_pb(logprob) for logprob in result.prompt_logprobs],
    )


def result_from_pb(message: pb.PrefillResult) -> PrefillResult:
    return PrefillResult(
        first=chunk_from_pb(message.first),
        kv=message.kv if message.HasField("kv") else None,
        prompt_logprobs=tuple(logprob_from_pb(entry) for entry in message.prompt_logprobs),
    )


def info_to_pb(info: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        engine_id=info.engine_id,
        role=_ROLE_TO_PB[info.role],
        model_name=info.model_name,
        model_digest=info.model_digest,
        numeric_fingerprint=info.numeric_fingerprint,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        weight_version=info.weight_version,
    )


def info_from_pb(message: pb.WorkerInfo) -> WorkerInfo:
    role = _ROLE_FROM_PB.get(message.role)
    if role is None:
        raise InvalidRequest(f"role {message.role} is unknown", param="role")
    _length("engine_id", message.engine_id, 1, MAX_ID_LENGTH)
    return WorkerInfo(
        engine_id=message.engine_id,
        role=role,
        model_name=message.model_name,
        model_digest=message.model_digest,
        numeric_fingerprint=message.numeric_fingerprint,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        weight_version=message.weight_version,
    )


def load_to_pb(load: WorkerLoad, *, with_histograms: bool = True) -> pb.WorkerLoad:
    """Without its histograms it says that they are unchanged."""
    message = pb.WorkerLoad(
        spec_accepted_per_position=load.spec_accepted_per_position,
        **{name: getattr(load, name) for name in _LOAD_NUMBERS},
    )
    if with_histograms:
        message.histograms.CopyFrom(pb.WorkerHistograms(readings=map(_histogram_to_pb, load.histograms)))
    return message


def load_from_pb(message: pb.WorkerLoad, earlier: tuple[HistogramReading, ...] = ()) -> WorkerLoad:
    """`earlier`: the histograms of the session's last load."""
    histograms = earlier
    if message.HasField("histograms"):
        _length("histograms", message.histograms.readings, 0, MAX_HISTOGRAMS)
        histograms = tuple(map(_histogram_from_pb, message.histograms.readings))
    accepted = message.spec_accepted_per_position
    _length("spec_accepted_per_position", accepted, 0, MAX_DRAFT_POSITIONS)
    numbers = {name: getattr(message, name) for name in _LOAD_NUMBERS}
    return WorkerLoad(histograms=histograms, spec_accepted_per_position=tuple(accepted), **numbers)


def _histogram_to_pb(reading: HistogramReading) -> pb.HistogramReading:
    return pb.HistogramReading(name=reading.name, bounds=reading.bounds, counts=reading.counts, sum=reading.sum)


def _histogram_from_pb(message: pb.HistogramReading) -> HistogramReading:
    _length("histograms.name", message.name, 1, MAX_ID_LENGTH)
    _length("histograms.bounds", message.bounds, 0, MAX_HISTOGRAM_BOUNDS)
    _length("histograms.counts", message.counts, len(message.bounds) + 1, len(message.bounds) + 1)
    return HistogramReading(message.name, tuple(message.bounds), tuple(message.counts), message.sum)


def inspection_to_pb(inspection: Inspection) -> worker_pb2.InspectReply:
    return worker_pb2.InspectReply(**{name: getattr(inspection, name) for name in Inspection.__struct_fields__})


def inspection_from_pb(message: worker_pb2.InspectReply) -> Inspection:
    fields = {name: getattr(message, name) for name in Inspection.__struct_fields__}
    return Inspection(**fields | {"kv_digests": tuple(message.kv_digests)})
