"""Histograms, and the reference of all metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from cluster.histogram import Histogram
from cluster.router.metrics_reference import reference
from cluster.rpc import convert
from cluster.rpc.pb.serving.v1 import common_pb2 as pb

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_a_histogram_counts_a_bound_into_its_own_bucket() -> None:
    histogram = Histogram("h", (1, 2.5))
    for value in (0.0, 1.0, 1.1, 2.5, 2.6, 100.0):
        histogram.observe(value)
    reading = histogram.reading()
    assert (reading.bounds, reading.counts) == ((1.0, 2.5), (2, 2, 2))
    assert reading.sum == pytest.approx(107.2)
    assert histogram.reading() is reading, "unchanged, so nobody needs to send it again"
    histogram.observe(1.0)
    assert histogram.reading().counts == (3, 2, 2)
    assert reading.counts == (2, 2, 2)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("histograms.name", pb.HistogramReading(name="", bounds=[1.0], counts=[1, 2])),
        ("histograms.counts", pb.HistogramReading(name="h", bounds=[1.0], counts=[1])),
        ("histograms.bounds", pb.HistogramReading(name="h", bounds=[0.5] * 129, counts=[1] * 130)),
    ],
)
def test_a_histogram_that_makes_no_sense_is_refused(field: str, message: pb.HistogramReading) -> None:
    load = pb.WorkerLoad(histograms=pb.WorkerHistograms(readings=[message]))
    with pytest.raises(InvalidRequest) as refused:
        convert.load_from_pb(load)
    assert refused.value.param == field


def test_too_many_histograms_are_refused() -> None:
    reading = pb.HistogramReading(name="h", counts=[1])
    with pytest.raises(InvalidRequest):
        convert.load_from_pb(pb.WorkerLoad(histograms=pb.WorkerHistograms(readings=[reading] * 65)))


def test_the_reference_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == reference(), "run `make docs`"
