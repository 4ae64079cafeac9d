"""What a scrape gets: the format to the letter, and the figures of known steps."""

from __future__ import annotations

import math

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from step_records import make_record, overlapped

from makeready.engine.exposition import Counter, Family, Gauge, Histogram, render
from makeready.engine.metrics import Metrics
from makeready.engine.output import Output
from makeready.graphs.plan.spec import EXTEND, Bucket


def parse(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples, by the parser of the format's own library."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def scraped(*families: Family) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return parse(render(family.metric() for family in families)[0])


def test_the_text_says_what_was_counted() -> None:
    counter = Counter("http_requests_total", "The total number of\nHTTP requests.", ("method", "code"))
    counter.add(1026, ("post", "200"))
    counter.add(1, ("post", "200"))
    counter.add(3, ('a"b\\c\n', "400"))
    gauge = Gauge("load", "Now.")
    gauge.set(0.25)
    histogram = Histogram("request_seconds", "How long.", (0.05, 1))
    for value, count in ((0.05, 1), (0.2, 2), (3.0, 1)):
        histogram.observe(value, count)
    found = scraped(counter, gauge, histogram)
    assert found["http_requests_total", frozenset({("method", "post"), ("code", "200")})] == 1027
    assert found["http_requests_total", frozenset({("method", 'a"b\\c\n'), ("code", "400")})] == 3
    plain = {name: value for (name, labels), value in found.items() if not labels}
    assert (plain["load"], plain["request_seconds_sum"], plain["request_seconds_count"]) == (0.25, 3.45, 4)
    below = {dict(labels)["le"]: value for (name, labels), value in found.items() if name.endswith("_bucket")}
    assert below == {"0.05": 1, "1.0": 3, "+Inf": 4}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**53])
def test_numbers_are_those_that_prometheus_reads(value: float) -> None:
    gauge = Gauge("load", "Now.")
    gauge.set(value)
    (read,) = scraped(gauge).values()
    assert read == value or (math.isnan(value) and math.isnan(read))


def test_who_reads_the_newer_format_gets_it() -> None:
    body, kind = Metrics("smol").render("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(body.decode())}
    assert {"makeready_generated_tokens", "vllm:generation_tokens"} <= names


def test_steps_are_counted() -> None:
    metrics = Metrics()
    parse(metrics.render()[0])  # before anything happened
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
            drafts=4,
            drafted=12,
            accepted=7,
        )
    )
    found = {
        (name.removeprefix("makeready_"), *(value for _, value in sorted(labels))): value
        for (name, labels), value in parse(metrics.render()[0]).items()
    }
    assert (found["generated_tokens_total",], found["prompt_tokens_total",]) == (3 * 6 + 5, 45)
    assert (found["cached_tokens_total",], found["retractions_total",]) == (16, 1)
    guessed = [found[f"{name}_total",] for name in ("drafts", "drafted_tokens", "accepted_tokens")]
    assert guessed == [4, 12, 7]
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
    found = {name: value for (name, labels), value in parse(metrics.render()[0]).items() if not labels}
    assert found["makeready_e2e_seconds_count"] == 2
    assert found["makeready_time_to_first_token_seconds_sum"] == pytest.approx(0.6)
    assert found["makeready_inter_token_seconds_count"] == 5
    assert found["makeready_inter_token_seconds_sum"] == pytest.approx(0.05)
    reasons = {
        dict(labels)["reason"]
        for name, labels in parse(metrics.render()[0])
        if name.endswith("requests_total")
    }
    assert reasons == {"length", "stop", "abort", "error"}
