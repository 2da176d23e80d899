"""Request bodies: whatever a client sends becomes a job or one `InvalidRequest`, never another error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded
from cluster.router.admission import Admission
from cluster.router.config import RouterConfig, read_config
from cluster.router.endpoints import split_prompts
from cluster.router.job import Job, Prompt, chat_job, check_prompt_ids, completion_job, fit_max_tokens
from cluster.router.openai import ChatRequest, CompletionRequest, check_supported, decode_body, plain_messages
from tests.worker_info import worker_info

LIMITS = worker_info(vocab_size=50)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def fields_of(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(kind.__struct_fields__), json_values, max_size=6)


def to_job(body: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> Job:
    request = decode_body(body, kind)
    check_supported(request)
    if isinstance(request, ChatRequest):
        plain_messages(request.messages)
        return chat_job(request, Prompt((1, 2, 3)), LIMITS)
    prompts = [Prompt((1, 2) if isinstance(prompt, str) else prompt) for prompt in split_prompts(request.prompt)]
    for prompt in prompts:
        check_prompt_ids(prompt.token_ids, LIMITS)
    return completion_job(request, tuple(prompts), LIMITS)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_body_is_a_job_or_an_invalid_request(data: st.DataObject) -> None:
    kinds: list[type[ChatRequest] | type[CompletionRequest]] = [ChatRequest, CompletionRequest]
    kind = data.draw(st.sampled_from(kinds))
    valid = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatRequest else {"prompt": "x"}
    body = msgspec.json.encode({**valid, **data.draw(fields_of(kind))})
    try:
        job = to_job(body, kind)
    except InvalidRequest:
        return
    for sampling, prompt in zip(job.sampling, job.prompts, strict=True):
        sampling.check(LIMITS.vocab_size)
        assert len(prompt.token_ids) + sampling.max_tokens <= LIMITS.max_model_len


@given(st.binary(max_size=60))
def test_any_bytes_are_an_invalid_request_or_decoded(body: bytes) -> None:
    try:
        decode_body(body, CompletionRequest)
    except InvalidRequest:
        return


def test_defaults_are_openais() -> None:
    chat = to_job(b'{"messages": [{"role": "user", "content": "x"}], "unknown": {"a": [1]}}', ChatRequest)
    text = to_job(b'{"prompt": "x"}', CompletionRequest)
    assert chat.sampling[0].max_tokens == 97, "a chat may use what the context has left"
    assert text.sampling[0].max_tokens == 16
    assert text.sampling[0].temperature == 1.0
    assert text.sampling[0].logprobs is None
    assert to_job(b'{"prompt": "x"}', CompletionRequest).sampling[0].seed != text.sampling[0].seed


def test_prompts_of_a_batch_without_a_seed_have_their_own() -> None:
    """One prompt given twice is a way to draw twice."""
    drawn = to_job(b'{"prompt": ["x", "x", "x"]}', CompletionRequest).sampling
    assert len({sampling.seed for sampling in drawn}) == 3
    given = to_job(b'{"prompt": ["x", "x", "x"], "seed": 5}', CompletionRequest).sampling
    assert [sampling.seed for sampling in given] == [5, 5, 5]


def test_a_bias_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="logit_bias: a token id is given twice"):
        to_job(b'{"prompt": "x", "logit_bias": {"1": -100, "01": 100}}', CompletionRequest)


def test_all_sampling_fields_arrive() -> None:
    body = msgspec.json.encode(
        {
            "prompt": [5],
            "max_tokens": 7,
            "min_tokens": 2,
            "seed": -1,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": -1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": {"7": -100, "3": 5},
            "stop": "end",
            "stop_token_ids": [9, 4],
            "ignore_eos": True,
            "logprobs": 2,
            "echo": True,
        }
    )
    sampling = to_job(body, CompletionRequest).sampling[0]
    assert sampling.seed == (1 << 63) - 1
    assert sampling.is_greedy
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 0.5, 0.1)
    assert sampling.logit_bias == ((3, 5.0), (7, -100.0))
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("end",), (4, 9), True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 2)
    assert (sampling.max_tokens, sampling.min_tokens) == (7, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)


def test_max_tokens_zero_is_for_scoring_a_prompt() -> None:
    job = to_job(b'{"prompt": [1, 2], "max_tokens": 0, "echo": true, "logprobs": 1}', CompletionRequest)
    assert job.discards_output
    assert job.sampling[0].max_tokens == 1
    with pytest.raises(InvalidRequest, match="at least 1"):
        to_job(b'{"prompt": [1, 2], "max_tokens": 0}', CompletionRequest)


def test_fit_max_tokens() -> None:
    assert fit_max_tokens(90, None, 100, 16, "max_tokens") == 10
    assert fit_max_tokens(99, 1, 100, 16, "max_tokens") == 1
    for num_prompt_tokens, wanted in ((100, None), (99, 2)):
        with pytest.raises(ContextTooLong, match="100 tokens"):
            fit_max_tokens(num_prompt_tokens, wanted, 100, 16, "max_tokens")


def test_admission_counts_sequences_and_gives_them_back() -> None:
    admission = Admission(max_sequences=4, max_sequences_per_request=3)
    with admission.running(3):
        with pytest.raises(Overloaded, match="3 of 4"), admission.running(2):
            pass
        with admission.running(1):
            assert admission.num_sequences == 4
    assert admission.num_sequences == 0
    with pytest.raises(InvalidRequest, match="at most 3"), admission.running(4):
        pass
    admission.is_draining = True
    with pytest.raises(Overloaded, match="shutting down"), admission.running(1):
        pass


def test_config_names_what_is_wrong(tmp_path: Any) -> None:
    path = tmp_path / "router.json"
    good = RouterConfig(model_name="m", model_path="p", decode=("127.0.0.1:1",))
    path.write_bytes(msgspec.json.encode(good))
    assert read_config(path) == good
    for wrong, said in (
        ({"prot": 1}, "prot"),
        ({"port": 70_000}, "port"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"decode": "x"}, "decode"),
    ):
        path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(good), **wrong}))
        with pytest.raises(Exception, match=said):
            read_config(path)
