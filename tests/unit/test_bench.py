"""The parts of `cluster bench` that need no server."""

from __future__ import annotations

import random
import statistics
from array import array
from itertools import islice, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.bench.arrivals import arrival_times
from cluster.bench.http_client import RequestFailed
from cluster.bench.measure import Meter, RequestRecord, Samples, quantile
from cluster.bench.options import BenchOptions, Lengths, Slo, check_options, parse_lengths, parse_slo
from cluster.bench.prompts import FilePrompts, SyntheticPrompts
from cluster.bench.report import html_report
from cluster.bench.result_file import FORMAT_VERSION, ResultFile, RunLine, read_result
from cluster.bench.stream import AnswerStream
from cluster.bench.svg import plot
from cluster.bench.tables import rate_lines
from cluster.errors import ConfigError

NO_GAPS: array[float] = array("d")
RUN = RunLine(version=FORMAT_VERSION, url="http://a<b>", model="m&m", options={"rate": 2.0}, started="now")


def record(index: int = 0, **changes: object) -> RequestRecord:
    values = {"index": index, "started_s": float(index), "e2e_s": 1.0, "ttft_s": 0.2, "itl_s": 0.05, "max_itl_s": 0.1}
    return RequestRecord(**{"num_prompt_tokens": 10, "num_output_tokens": 5, **values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["512", "uniform:5:9", "lognormal:100:0.5"])
def test_lengths_are_read_and_written_the_same(text: str) -> None:
    assert str(parse_lengths(text, "--prompt-tokens")) == text


@pytest.mark.parametrize("text", ["", "0", "-3", "uniform:9:5", "uniform:5", "lognormal:0:1", "normal:5:1", "1:2", "x"])
def test_lengths_that_make_no_sense_are_refused_with_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        parse_lengths(text, "--prompt-tokens")


def test_drawn_lengths_have_their_distribution() -> None:
    rng = random.Random(1)
    drawn = [Lengths("uniform", 5, 9).draw(rng) for _ in range(500)]
    assert set(drawn) == {5, 6, 7, 8, 9}
    drawn = [Lengths("lognormal", 100, 0.5).draw(rng) for _ in range(2000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.1)
    assert statistics.mean(drawn) > 105, "skewed to the right"
    assert max(drawn) <= 800


def test_slo() -> None:
    assert parse_slo("ttft=500ms, itl=0.05") == Slo(ttft=0.5, itl=0.05)
    for text in ("ttft", "ttft=", "tpot=5ms", "itl=-1s", "e2e=nan"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(text)


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--rate", {"rate": None}),
        ("--rate", {"concurrency": 1}),
        ("--rate", {"rate": 0.0}),
        ("--requests", {"num_requests": None}),
        ("URL", {"url": "localhost:8000"}),
    ],
)
def test_options_that_make_no_sense_are_refused(flag: str, changes: dict[str, object]) -> None:
    values = {"url": "http://h", "rate": 1.0, "num_requests": 5, **changes}
    with pytest.raises(ConfigError, match=flag):
        check_options(BenchOptions(**values))  # type: ignore[arg-type]


def test_arrivals() -> None:
    assert list(islice(arrival_times("constant", 4.0, 0), 3)) == [0.0, 0.25, 0.5]
    times = list(islice(arrival_times("poisson", 4.0, 0), 4000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1), "exponential: as wide as its mean"
    assert list(islice(arrival_times("poisson", 4.0, 0), 4000)) == times, "by seed"


def test_quantiles_are_between_neighbours() -> None:
    assert [quantile([1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.5, 2.0, 3.0, 4.0]


def test_samples_beyond_the_capacity_are_still_of_all_values() -> None:
    samples = Samples(capacity=1000)
    for value in range(20_000):
        samples.add(float(value))
    found = samples.statistics()
    assert found is not None
    assert (found.count, found.mean, found.maximum) == (20_000, 9999.5, 19_999.0)
    assert found.median == pytest.approx(10_000, rel=0.1)


def test_goodput_counts_requests_that_meet_every_bound() -> None:
    meter = Meter(Slo(ttft=0.5, itl=0.06))
    meter.add(record(0), NO_GAPS)
    meter.add(record(1, ttft_s=0.6), NO_GAPS)
    meter.add(record(2, itl_s=0.07), NO_GAPS)
    meter.add(record(3, itl_s=None, max_itl_s=None), NO_GAPS)
    meter.add(record(4, ttft_s=None, error="http_503"), NO_GAPS)
    summary = meter.summary()
    assert summary.good_share == 2 / 5, "a request of one token has no gap; a failed one is not good"
    assert summary.goodput_per_s == pytest.approx(2 / 5.0)
    assert (summary.num_requests, summary.num_failed, summary.errors) == (5, 1, {"http_503": 1})
    assert summary.output_tokens_per_s == pytest.approx(4 * 5 / 5.0)


def test_the_first_of_each_kind_of_failure_is_told_in_its_own_words() -> None:
    meter = Meter(Slo())
    for index, (kind, said) in enumerate((("http_400", "9000 tokens"), ("http_400", "other"), ("timeout", ""))):
        meter.add(record(index, ttft_s=None, error=kind, message=said * 200), NO_GAPS)
    lines = dict(rate_lines(meter.summary()))
    assert lines["failed: http_400"].startswith("2: 9000 tokens9000")
    assert len(lines["failed: http_400"]) < 200
    assert lines["failed: timeout"] == "1"


def test_chunks_of_several_tokens_count_as_that_many_in_the_curve() -> None:
    meter = Meter(Slo())
    meter.add(record(0, num_output_tokens=12), array("d", [0.1, 0.1, 1.0]))
    assert sum(meter.tokens_by_second.values()) == pytest.approx(12)


def event(text: str, finish: str = "null") -> bytes:
    return f'data: {{"choices":[{{"index":0,"text":"{text}","finish_reason":{finish}}}]}}\n\n'.encode()


def test_a_stream_is_timed_by_arrival_however_it_is_cut() -> None:
    stream = AnswerStream()
    first, second = event("a"), event("b") + event("", '"length"')
    stream(first[:20], 1.0)
    stream(first[20:], 2.0)
    stream(
        second + b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\r\n\r\ndata: [DONE]\n\n', 2.5
    )
    stream.check_complete()
    assert (stream.first_at, stream.last_at, list(stream.gaps)) == (2.0, 2.5, [0.5])
    assert (stream.num_prompt_tokens, stream.num_tokens, stream.finish_reason) == (7, 2, "length")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("truncated", event("a")),
        ("empty", event("", '"stop"') + b"data: [DONE]\n\n"),
        ("error_event", event("a") + b'data: {"error":{"message":"worker lost"}}\n\n'),
        ("error_event", b"data: {nonsense\n\n"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(kind: str, data: bytes) -> None:
    stream = AnswerStream()
    stream(data, 1.0)
    with pytest.raises(RequestFailed) as failed:
        stream.check_complete()
    assert failed.value.kind == kind


def test_synthetic_prompts_have_the_wanted_number_of_words_and_differ() -> None:
    options = BenchOptions(url="http://h", prompt_tokens=Lengths("fixed", 20))
    prompts = SyntheticPrompts(options, ("a", "b", "c", "d"), 3)
    texts = [prompts.next().text for _ in range(50)]
    assert {len(text.split()) for text in texts} == {17}
    assert len(set(texts)) == 50


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('plain text\n\n{"prompt": "json", "max_tokens": 3}\n')
    prompts = FilePrompts(path)
    assert [(prompt.text, prompt.max_tokens) for prompt in (prompts.next(), prompts.next(), prompts.next())] == [
        ("plain text", None),
        ("json", 3),
        ("plain text", None),
    ]
    path.write_text('fine\n{"promt": "typo"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        FilePrompts(path)


def test_results_are_read_back_and_half_of_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.jsonl"
    meter = Meter(Slo(ttft=0.5))
    with ResultFile(path, RUN) as result:
        meter.add(record(), array("d", [0.05, 0.1]))
        result.add(record(), NO_GAPS)
        result.end(meter.summary(), is_complete=True)
    run, line = read_result(path)
    assert (run, line.summary, line.is_complete) == (RUN, meter.summary(), True)
    path.write_bytes(path.read_bytes().splitlines()[0])
    with pytest.raises(ConfigError, match="no complete result"):
        read_result(path)


def test_the_report_needs_no_network_and_escapes_what_it_shows() -> None:
    meter = Meter(Slo())
    for index in range(30):
        meter.add(record(index, ttft_s=0.1 + index / 100), array("d", [0.05, 0.1, 0.02]))
    report = html_report(RUN, meter.summary(), meter, is_complete=False)
    assert "http://a&lt;b&gt;" in report
    assert "m&amp;m" in report
    assert "interrupted" in report
    assert report.count("<svg") == 5
    assert "<script" not in report
    assert "src=" not in report
    assert "<link" not in report


def test_plots_are_xml_inside_their_frame() -> None:
    points = [(0.0, 0.0), (3.7, 12.0), (9.9, 47.0)]
    root = ElementTree.fromstring(plot([("a & b", points), ("c", points)], x_label="x", y_label="y"))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    (line, _) = root.iter("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert len(places) == 3
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert places[0][1] > places[2][1], "higher values are drawn higher"
    assert ElementTree.fromstring(plot([("", [])], x_label="x", y_label="y")) is not None
