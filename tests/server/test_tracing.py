"""OpenTelemetry: what the SDK's own exporters get of requests over HTTP."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import openai
import pytest
from in_process import InProcess, served
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from server_process import ROOT, until

from makeready.engine.server.settings import ServerSettings
from makeready.engine.server.tracing import Tracing, TracingError, exporter

GENERATE = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}


@contextmanager
def traced(
    settings: ServerSettings | None = None, **options: object
) -> Iterator[tuple[InProcess, InMemorySpanExporter]]:
    spans = InMemorySpanExporter()
    with served(settings, **options) as server:
        server.service.tracing = Tracing(SimpleSpanProcessor(spans))
        yield server, spans


def finished(spans: InMemorySpanExporter, requests: int = 1) -> list[ReadableSpan]:
    until(lambda: sum(span.name == "llm_request" for span in spans.get_finished_spans()) == requests)
    return list(spans.get_finished_spans())


def test_a_request_continues_its_clients_trace() -> None:
    with (
        traced() as (server, spans),
        TracerProvider().get_tracer("client").start_as_current_span("asks") as asks,
    ):
        headers: dict[str, str] = {"x-request-id": "mine"}
        TraceContextTextMapPropagator().inject(headers)
        before = time.time_ns()
        body = GENERATE | {"n": 2, "temperature": 0.5, "top_p": 0.9}
        httpx.post(server.url + "/v1/completions", json=body, headers=headers).raise_for_status()
        (request,) = [span for span in finished(spans) if span.name == "llm_request"]
        after = time.time_ns()
        assert request.parent is not None
        assert request.parent.span_id == asks.get_span_context().span_id
        assert request.context.trace_id == asks.get_span_context().trace_id
        assert request.kind is SpanKind.SERVER
        assert request.status.status_code is StatusCode.UNSET
        assert before <= request.start_time < request.end_time <= after
        said = dict(request.attributes or {})
        for name, value in {
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "fake",
            "gen_ai.request.id": "mine",
            "gen_ai.response.id": "mine",
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.max_tokens": 5,
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.stream": False,
            "gen_ai.response.finish_reasons": ("length", "length"),
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 10,
        }.items():
            assert said[name] == value, name
        parts = [span for span in spans.get_finished_spans() if span.name != "llm_request"]
        assert sorted(span.name for span in parts) == sorted(["queue", "prefill", "decode"] * 2)
        assert all(part.parent and part.parent.span_id == request.context.span_id for part in parts)
        for sample in (0, 1):
            mine = {
                part.name: part for part in parts if (part.attributes or {})["makeready.sample"] == sample
            }
            ends = [(mine[name].start_time, mine[name].end_time) for name in ("queue", "prefill", "decode")]
            assert ends[0][1] == ends[1][0] and ends[1][1] == ends[2][0]  # noqa: PT018
            assert (
                request.start_time <= ends[0][0] <= ends[0][1] <= ends[1][1] <= ends[2][1] <= request.end_time
            )
        whole = said["gen_ai.latency.time_in_queue"] + said["gen_ai.latency.time_in_model_prefill"]
        assert whole == pytest.approx(said["gen_ai.latency.time_to_first_token"], abs=1e-4)


def test_what_is_refused_and_who_leaves_is_told_and_what_asks_nothing_is_not() -> None:
    with traced() as (server, spans):
        server.executable.shut()
        httpx.get(server.url + "/health")
        httpx.post(server.url + "/tokenize", json={"prompt": "x"})
        assert (
            httpx.post(server.url + "/v1/completions", json=GENERATE | {"prompt": [9999]}).status_code == 400
        )
        (refused,) = finished(spans)
        assert refused.parent is None
        assert (refused.attributes or {})["error.type"] == "400"
        assert refused.status.status_code is StatusCode.UNSET  # as the conventions have it for servers
        spans.clear()
        server.executable.allow(10)  # of the 200 that it needs
        stream = GENERATE | {"max_tokens": 200, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=stream) as answer:
            next(answer.iter_bytes())
        left = finished(spans)
        server.executable.open()
        said = {span.name: span.attributes or {} for span in left}
        assert said["llm_request"]["gen_ai.response.finish_reasons"] == ("abort",)
        assert said["llm_request"]["gen_ai.request.stream"] is True
        assert 0 < said["decode"]["gen_ai.usage.output_tokens"] < 200


def test_a_client_that_does_not_sample_is_not_traced() -> None:
    with traced() as (server, spans):
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
        for sampled in (0, 1):
            headers = {"traceparent": f"{parent}{sampled}"}
            httpx.post(server.url + "/v1/completions", json=GENERATE, headers=headers).raise_for_status()
        (request,) = [span for span in finished(spans) if span.name == "llm_request"]
        assert request.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C


def test_rows_of_a_batch_have_spans_as_requests_do(tmp_path: Path) -> None:
    given = {"a": [1, 2, 3], "b": [4, 5], "wrong": [9999]}
    rows = "\n".join(
        json.dumps(
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/completions",
                "body": GENERATE | {"model": "fake", "prompt": prompt},
            }
        )
        for name, prompt in given.items()
    )
    with traced(ServerSettings(["fake"], files_dir=tmp_path)) as (server, spans):
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        file = client.files.create(file=("in.jsonl", io.BytesIO(rows.encode())), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        ended = finished(spans, requests=3)
        requests = {
            (span.attributes or {})["makeready.batch.row"]: span
            for span in ended
            if span.name == "llm_request"
        }
        assert sorted(requests) == [1, 2, 3]
        for number, prompt in enumerate(given.values(), start=1):
            span = requests[number]
            said = dict(span.attributes or {})
            assert span.kind is SpanKind.INTERNAL
            assert span.parent is None
            assert said["makeready.batch"] == batch.id
            assert said["gen_ai.request.id"] == f"{batch.id}-{number}"
            below = [each for each in ended if each.parent and each.parent.span_id == span.context.span_id]
            if prompt == [9999]:
                assert said["error.type"] == "400"
                assert not below
                continue
            assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (len(prompt), 5)
            assert [each.name for each in sorted(below, key=lambda each: each.start_time)] == [
                "queue",
                "prefill",
                "decode",
            ]
            assert all(span.start_time <= each.start_time <= each.end_time <= span.end_time for each in below)
        assert len({span.context.trace_id for span in requests.values()}) == 3


def test_spans_arrive_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    with served() as server:
        server.service.tracing = tracing = Tracing()
        httpx.post(server.url + "/v1/completions", json=GENERATE).raise_for_status()
        until(lambda: not server.service.running)
        tracing.close()
    collector.shutdown()
    collector.server_close()
    sent = ExportTraceServiceRequest.FromString(b"".join(bodies)).resource_spans  # several where it took long
    for part in sent:
        said = {each.key: each.value.string_value for each in part.resource.attributes}
        assert said["service.name"] == "makeready"
    names = [span.name for part in sent for scope in part.scope_spans for span in scope.spans]
    assert sorted(names) == ["decode", "llm_request", "prefill", "queue"]


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert exporter() is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "no_such")
    with pytest.raises(TracingError, match="no_such"):
        exporter()
    blocked = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; from makeready.scripts.serve import main; "
        "sys.exit(main(['checkpoint=dummy', 'model=smollm2_135m', 'otel=true']))"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith('install it with: pip install "makeready[otel]"')
