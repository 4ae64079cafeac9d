"""What a scrape gets: the format to the letter, and the figures of known steps."""

from __future__ import annotations

import math
import re

import pytest
from step_records import make_record, overlapped

from makeready.engine.exposition import Counter, Gauge, Histogram, render
from makeready.engine.metrics import Metrics
from makeready.engine.output import Output
from makeready.graphs.plan.spec import EXTEND, Bucket

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')


def parse(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A strict reader of the format: HELP and TYPE once before the samples of a family, none interleaved."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    seen: list[str] = []
    kind = ""
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in seen
            seen.append(family)
            head, family_again, kind = next(lines).rsplit(" ", 2)
            assert (head, family_again) == ("# TYPE", family)
            assert kind in ("counter", "gauge", "histogram")
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        assert found[1] in [seen[-1] + suffix for suffix in suffixes]
        labels = LABEL.findall(found[2] or "")
        assert ",".join(f'{name}="{value}"' for name, value in labels) == (found[2] or "")
        key = (found[1], frozenset(labels))
        assert key not in samples
        samples[key] = float(found[3])
    return samples


def test_the_text_is_that_of_the_format() -> None:
    counter = Counter("http_requests_total", "The total number of\nHTTP requests.", ("method", "code"))
    counter.add(1026, ("post", "200"))
    counter.add(1, ("post", "200"))
    counter.add(3, ('a"b\\c\n', "400"))
    gauge = Gauge("load", "Now.")
    gauge.set(0.25)
    histogram = Histogram("request_seconds", "How long.", (0.05, 1))
    for value, count in ((0.05, 1), (0.2, 2), (3.0, 1)):
        histogram.observe(value, count)
    assert render([counter, gauge, histogram]) == (
        "# HELP http_requests_total The total number of\\nHTTP requests.\n"
        "# TYPE http_requests_total counter\n"
        'http_requests_total{method="post",code="200"} 1027\n'
        'http_requests_total{method="a\\"b\\\\c\\n",code="400"} 3\n'
        "# HELP load Now.\n"
        "# TYPE load gauge\n"
        "load 0.25\n"
        "# HELP request_seconds How long.\n"
        "# TYPE request_seconds histogram\n"
        'request_seconds_bucket{le="0.05"} 1\n'
        'request_seconds_bucket{le="1"} 3\n'
        'request_seconds_bucket{le="+Inf"} 4\n'
        "request_seconds_sum 3.45\n"
        "request_seconds_count 4\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "NaN"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (2**53, "9007199254740992.0")],
)
def test_numbers_are_those_that_prometheus_reads(value: float, text: str) -> None:
    gauge = Gauge("load", "Now.")
    gauge.set(value)
    assert render([gauge]).splitlines()[-1] == f"load {text}"
    assert float(text) == value or math.isnan(value)


def test_steps_are_counted() -> None:
    metrics = Metrics()
    parse(metrics.render())  # before anything happened
    for record in overlapped(3):
        metrics.step(record)
    metrics.step(
        make_record(
            bucket=Bucket(EXTEND, 8, 64),
            tokens=50,
            prompt_tokens=45,
            cached_tokens=16,
            new_tokens=5,
            retractions=1,
            launch_start=9.0,
            results_read=9.5,
        )
    )
    found = {
        (name.removeprefix("makeready_"), *(value for _, value in sorted(labels))): value
        for (name, labels), value in parse(metrics.render()).items()
    }
    assert (found["generated_tokens_total",], found["prompt_tokens_total",]) == (3 * 6 + 5, 45)
    assert (found["cached_tokens_total",], found["retractions_total",]) == (16, 1)
    assert (found["waiting_requests",], found["running_requests",]) == (2, 6)
    assert [found["kv_pages", state] for state in ("free", "cached", "held")] == [5, 4, 3]
    assert (found["steps_total", "decode-8"], found["padding_tokens_total", "decode-8"]) == (3, 6)
    assert (found["live_tokens_total", "extend-8x64"], found["padding_tokens_total", "extend-8x64"]) == (
        50,
        14,
    )
    # The first from its launch, the others from the results before them: 10 ms each, though launched early.
    assert found["step_seconds_sum", "decode"] == pytest.approx(1.011 - 1.0002 + 0.02)
    assert found["step_seconds_sum", "extend"] == pytest.approx(0.5)
    assert found["host_seconds_sum", "decode"] == pytest.approx(3 * (0.0004 + 0.0005))


def test_requests_are_counted() -> None:
    metrics = Metrics()
    meta = {"queue_time": 0.1, "time_to_first_token": 0.3, "e2e_latency": 0.35}
    metrics.finish(Output("", (1,) * 6, "length", 4, meta_info=meta))
    metrics.finish(Output("", (1,), "stop", 4, meta_info=meta))
    metrics.finish(Output("", (), "abort", 4, meta_info=meta))
    metrics.finish(Output.refused("too long"))
    found = {name: value for (name, labels), value in parse(metrics.render()).items() if not labels}
    assert found["makeready_e2e_seconds_count"] == 2
    assert found["makeready_time_to_first_token_seconds_sum"] == pytest.approx(0.6)
    assert found["makeready_inter_token_seconds_count"] == 5
    assert found["makeready_inter_token_seconds_sum"] == pytest.approx(0.05)
    reasons = {
        dict(labels)["reason"] for name, labels in parse(metrics.render()) if name.endswith("requests_total")
    }
    assert reasons == {"length", "stop", "abort", "error"}
