"""From chunks to what a client reads: text, stop strings, events."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from cluster.router.job import Job, OutputOptions, Prompt, sibling_seed
from cluster.router.logprobs import NO_PROBABILITY, LogprobFormat
from cluster.router.responses import usage_of
from cluster.router.sse import ChunkWriter
from cluster.router.text import ChoiceText, Delta
from cluster.types import FinishReason, SamplingParams, TokenChunk, TokenLogprob
from tests.fakes import EOS, ByteCodec


def chunk(token_ids: bytes | list[int], index: int = 0, **fields: Any) -> TokenChunk:
    return TokenChunk(request_id="r", attempt=0, index=index, token_ids=tuple(token_ids), **fields)


def choice_text(*, include_stop: bool = False, **sampling: Any) -> ChoiceText:
    params = SamplingParams(**{"max_tokens": 100, "seed": 0, **sampling})
    return ChoiceText(ByteCodec(), params, skip_special_tokens=True, include_stop=include_stop)


def test_text_waits_for_whole_characters_and_ends_with_what_is_left() -> None:
    text = choice_text()
    letters = "é€".encode()
    assert [text.push(chunk([byte])).text for byte in letters] == ["", "é", "", "", "€"]
    last = text.push(chunk([0xC3], finish_reason=FinishReason.LENGTH))
    assert last.text == "�"


def test_stop_string_across_chunks_drops_what_comes_behind_it() -> None:
    text = choice_text(stop=("END",))
    assert text.push(chunk(b"oneE")).text == "one"
    assert text.push(chunk(b"N", 4)).text == ""
    delta = text.push(chunk(b"D!?", 5))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (ord("D"),), FinishReason.STOP)
    assert delta.stop_reason == "END"


def test_stop_string_held_back_is_shown_when_it_does_not_come() -> None:
    text = choice_text(stop=("END",))
    assert text.push(chunk(b"E")).text == ""
    assert text.push(chunk(b"N", 1, finish_reason=FinishReason.LENGTH)).text == "EN"


def test_stop_string_is_not_looked_for_before_min_tokens() -> None:
    text = choice_text(stop=("a",), min_tokens=3)
    assert text.push(chunk(b"aa")).text == "aa"
    delta = text.push(chunk(b"a", 2))
    assert (delta.text, delta.finish_reason) == ("", FinishReason.STOP)


@pytest.mark.parametrize(("include_stop", "expected"), [(False, "ab"), (True, "abc")])
def test_token_that_ends_the_sequence(include_stop: bool, expected: str) -> None:
    text = choice_text(include_stop=include_stop, stop_token_ids=(ord("c"),))
    first = text.push(chunk(b"ab")).text
    last = text.push(chunk(b"c", 2, finish_reason=FinishReason.STOP, stop_token_id=ord("c")))
    assert first + last.text == expected
    assert (last.token_ids, last.stop_reason) == ((ord("c"),), ord("c"))
    ended = choice_text().push(chunk([EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert (ended.text, ended.stop_reason) == ("", None), "the model's own end is no stop reason"


def test_a_chunk_of_several_tokens_is_cut_where_its_stop_string_ends() -> None:
    logprobs = tuple(TokenLogprob(token, -float(token), 1) for token in b"oneENDtwo")
    text = choice_text(stop=("END",), logprobs=0)
    first = text.push(chunk(b"oneE", logprobs=logprobs[:4]))
    last = text.push(chunk(b"NDtwo", 4, logprobs=logprobs[4:]))
    assert (first.text, last.text) == ("one", "")
    assert (last.token_ids, last.logprobs) == (tuple(b"ND"), logprobs[4:6])
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "END")


def test_a_chunk_of_several_tokens_that_ends_with_a_stop_token() -> None:
    text = choice_text(stop_token_ids=(ord("c"),), stop=("zz",))
    delta = text.push(chunk(b"abc", finish_reason=FinishReason.STOP, stop_token_id=ord("c")))
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("ab", tuple(b"abc"), ord("c"))


def make_job(*, is_chat: bool = True, n: int = 1, want_logprobs: bool = False, **output: bool) -> Job:
    return Job(
        is_chat=is_chat,
        prompts=(Prompt((1, 2), "x"),),
        n=n,
        sampling=(SamplingParams(max_tokens=5, seed=3),),
        output=OutputOptions(is_stream=True, **output),
        want_logprobs=want_logprobs,
    )


def writer_of(job: Job) -> ChunkWriter:
    return ChunkWriter(job, LogprobFormat(ByteCodec(), tokens_as_ids=False), job_id="id", created=1, model='m"1')


def parsed(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2, "a line break inside would cut the event"
    value: dict[str, Any] = json.loads(event[6:])
    return value


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("options", [{}, {"include_usage": True}])
def test_precomputed_chunks_have_the_shape_of_the_others(is_chat: bool, options: dict[str, bool]) -> None:
    writer = writer_of(make_job(is_chat=is_chat, n=2, **options))
    hello = Delta(text='hé"\n', token_ids=(1,))
    first, plain = parsed(writer.delta(1, hello, None)), parsed(writer.delta(1, hello, None))
    body = first["choices"][0]["delta"]["content"] if is_chat else first["choices"][0]["text"]
    assert body == 'hé"\n'
    if is_chat:
        assert first["choices"][0]["delta"].pop("role") == "assistant"
    assert first["choices"][0].pop("stop_reason") is None
    assert plain == first
    assert plain["choices"][0]["index"] == 1
    assert plain["model"] == 'm"1'
    assert ("usage" in plain) == bool(options)


def test_held_back_text_makes_no_event_but_a_finish_does() -> None:
    writer = writer_of(make_job())
    assert writer.delta(0, Delta(text="a", token_ids=(1,)), None)
    assert writer.delta(0, Delta(text="", token_ids=(1,)), None) == b""
    last = parsed(writer.delta(0, Delta(text="", token_ids=(1,), finish_reason=FinishReason.LENGTH), None))
    assert last["choices"][0]["finish_reason"] == "length"


def test_continuous_usage_and_token_ids() -> None:
    writer = writer_of(make_job(continuous_usage=True, return_token_ids=True))
    first = parsed(writer.delta(0, Delta(text="a", token_ids=(7,)), usage_of(2, 1, 0)))
    second = parsed(writer.delta(0, Delta(text="b", token_ids=(8,)), usage_of(2, 2, 0)))
    assert (first["prompt_token_ids"], first["choices"][0]["token_ids"]) == ([1, 2], [7])
    assert "prompt_token_ids" not in second
    assert second["usage"]["completion_tokens"] == 2


def test_tokens_with_the_same_text_do_not_hide_the_chosen_one() -> None:
    """Parts of a character all read as U+FFFD; the most likely of the others stands for them."""
    form = LogprobFormat(ByteCodec(), tokens_as_ids=False)
    chosen = TokenLogprob(0xE2, -0.125, 1, ((0xE2, -0.125), (0xE3, -2.0), (65, -2.5), (0xE4, -3.0)))
    unlikely = TokenLogprob(0xE2, -9.0, 4, ((0xE3, -0.5), (65, -2.5), (0xE4, -3.0)))
    found = form.legacy(
        [0xE2, 0xE2, 66], [chosen, unlikely, TokenLogprob(66, -8.0, 9, ((0xE3, -1.0), (0xE4, -2.0)))], 0
    )
    assert found.token_logprobs == [-0.125, -9.0, -8.0]
    assert found.top_logprobs == [
        {"\ufffd": -0.125, "A": -2.5},
        {"\ufffd": -9.0, "A": -2.5},
        {"\ufffd": -1.0, "B": -8.0},
    ]


def test_impossible_tokens_have_a_number_in_json() -> None:
    form = LogprobFormat(ByteCodec(), tokens_as_ids=True)
    entry = TokenLogprob(65, -0.5, 1, ((65, -0.5), (66, float("-inf"))))
    (chat,) = form.chat([entry]).content
    assert chat.top_logprobs[1].logprob == NO_PROBABILITY
    legacy = form.legacy([65], [entry], 10)
    assert legacy.tokens == ["token_id:65"]
    assert legacy.top_logprobs == [{"token_id:65": -0.5, "token_id:66": NO_PROBABILITY}]
    assert json.loads(msgspec.json.encode(form.prompt([None, entry])))[1]["66"]["rank"] == 2


def test_siblings_have_distinct_seeds_that_depend_on_the_first() -> None:
    seeds = {sibling_seed(seed, sibling) for seed in range(20) for sibling in range(50)}
    assert len(seeds) == 20 * 50
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sibling_seed(5, 0) == 5
    prompts = (Prompt((1,)), Prompt((2,)))
    job = msgspec.structs.replace(make_job(n=2), prompts=prompts, sampling=make_job().sampling * 2)
    requests = [job.request(choice, "job") for choice in range(job.num_choices)]
    assert [request.token_ids for request in requests] == [(1,), (1,), (2,), (2,)]
    assert [request.sampling.seed for request in requests] == [3, sibling_seed(3, 1)] * 2
    assert len({request.request_id for request in requests}) == 4


@pytest.mark.parametrize("is_chat", [True, False])
def test_one_event_carries_all_tokens_of_a_chunk(is_chat: bool) -> None:
    writer = writer_of(make_job(is_chat=is_chat, want_logprobs=True, return_token_ids=True))
    logprobs = tuple(TokenLogprob(token, -1.5, 1) for token in b"abc")
    writer.delta(0, Delta(text="x", token_ids=(120,), logprobs=(TokenLogprob(120, -0.5, 1),)), None)
    [choice] = parsed(writer.delta(0, Delta(text="abc", token_ids=tuple(b"abc"), logprobs=logprobs), None))["choices"]
    assert choice["token_ids"] == list(b"abc")
    if is_chat:
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b", "c"]
    else:
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [1, 2, 3]
