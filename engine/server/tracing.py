"""Traces for OpenTelemetry: a span a request, below its client's, and below it how each sample waited and ran.

Spans are made when a request is over, of the clocks that it has anyway. Names of attributes are those of the semantic
conventions for generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/), and those by which
vLLM and SGLang tell latencies. No text of a request or an answer is among them. Needs the extra ``otel``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from makeready.engine.reply import Reply
from makeready.engine.sequence import ABORT
from makeready.engine.server.service import Running
from makeready.engine.server.work import Work

SERVICE = "makeready"
REQUEST, QUEUE, PREFILL, DECODE = "llm_request", "queue", "prefill", "decode"
PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class TracingError(ValueError):
    """Spans cannot be sent where the environment says; a sentence that says why."""


def exporter() -> SpanExporter | None:
    """What sends spans, as OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_* say; None for nothing.

    Raises:
        TracingError: it is not installed.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if name == "none":
        return None
    kind = name
    if name == "otlp":
        said = (f"OTEL_EXPORTER_OTLP_{part}PROTOCOL" for part in ("TRACES_", ""))
        protocol = next((os.environ[each] for each in said if os.environ.get(each)), "http/protobuf")
        kind = PROTOCOLS.get(protocol, protocol)
    found = list(entry_points(group="opentelemetry_traces_exporter", name=kind))
    if not found:
        raise TracingError(
            f"there is no exporter {kind} for traces; install its package, or leave out OTEL_TRACES_EXPORTER and "
            "OTEL_EXPORTER_OTLP_PROTOCOL"
        )
    return found[0].load()()


class Tracing:
    """Makes spans of requests.

    Args:
        processor: gets them; None: those of the environment's :func:`exporter`, sent by a thread.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        if processor is None:
            made = exporter()
            processor = None if made is None else BatchSpanProcessor(made)
        if processor is not None:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("makeready.server")
        self._context = TraceContextTextMapPropagator()

    def ended(self, work: Work, told: Mapping[str, Any], *, served: bool) -> None:
        """Make the spans of what asked the engine for something, or was refused by it; see :meth:`Work.close`."""
        now, clock = time.time_ns(), time.perf_counter()
        parent = self._context.extract(work.headers)
        kind = SpanKind.SERVER if served else SpanKind.INTERNAL
        span = self._tracer.start_span(REQUEST, parent, kind, start_time=_nanoseconds(work.began, clock, now))
        if span.is_recording():
            span.set_attributes(dict(told))
            span.set_attributes(dict(_asked(work)))
            problem = work.problem
            if problem is not None:
                span.set_attribute("error.type", str(problem.status))
                if problem.status >= 500:
                    span.set_status(StatusCode.ERROR, problem.message)
            if work.running:
                span.set_attributes(dict(_answered(work, clock)))
            below = set_span_in_context(span)
            for number, reply in enumerate(_replies(work)):
                self._sample(number, reply, below, clock, now)
        span.end(now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _sample(self, number: int, reply: Reply, below: Context, clock: float, now: int) -> None:
        for name, begin, end in _phases(reply, clock):
            span: Span = self._tracer.start_span(
                name,
                below,
                attributes={"makeready.sample": number},
                start_time=_nanoseconds(begin, clock, now),
            )
            if name == PREFILL:
                span.set_attribute("gen_ai.usage.input_tokens", len(reply.sequence.prompt))
                span.set_attribute("gen_ai.usage.cache_read.input_tokens", reply.sequence.cached_tokens)
            elif name == DECODE:
                span.set_attribute("gen_ai.usage.output_tokens", len(reply.sequence.output))
                span.set_attribute("makeready.retractions", reply.sequence.retractions)
            span.end(_nanoseconds(end, clock, now))


def _phases(reply: Reply, clock: float) -> Iterator[tuple[str, float, float]]:
    """What a sample went through, from when to when; when it was admitted is known once it has ended."""
    end, first = reply.finished or clock, reply.first_token
    if reply.admitted:
        yield QUEUE, reply.arrived, reply.admitted
        yield PREFILL, reply.admitted, first or end
    elif not first:
        yield QUEUE, reply.arrived, end
    if first:
        yield DECODE, first, end


def _asked(work: Work) -> Iterator[tuple[str, Any]]:
    yield "gen_ai.provider.name", SERVICE
    yield "gen_ai.request.model", work.service.name
    yield "gen_ai.request.id", work.id
    yield "gen_ai.request.stream", work.streams
    yield "gen_ai.operation.name", "chat" if work.asks[0].kind == "messages" else "text_completion"


def _answered(work: Work, clock: float) -> Iterator[tuple[str, Any]]:
    params, replies = work.running[0].params, _replies(work)
    stops = (params.stop,) if isinstance(params.stop, str) and params.stop else params.stop
    for name, value in (
        ("temperature", params.temperature),
        ("top_p", params.top_p),
        ("top_k", params.top_k if params.top_k > 0 else None),
        ("frequency_penalty", params.frequency_penalty or None),
        ("presence_penalty", params.presence_penalty or None),
        ("max_tokens", params.max_new_tokens),
        ("seed", params.sampling_seed),
        ("stop_sequences", list(stops) or None),
        ("choice.count", len(replies)),
        ("n", params.n),
    ):
        if value is not None:
            yield f"gen_ai.request.{name}", value
    yield "gen_ai.response.model", work.service.name
    yield "gen_ai.response.id", work.running[0].id
    yield "gen_ai.response.finish_reasons", [reply.finish_reason or ABORT for reply in replies]
    prompts = [reply for run in work.running for reply in run.replies[:: run.params.n]]
    read = sum(len(reply.sequence.prompt) for reply in prompts)
    made = sum(len(reply.sequence.output) for reply in replies)
    cached = sum(reply.sequence.cached_tokens for reply in prompts)
    for name, value in (
        *(("input_tokens", read), ("prompt_tokens", read)),
        *(("output_tokens", made), ("completion_tokens", made)),
        *(("cache_read.input_tokens", cached), ("cached_tokens", cached)),
    ):
        yield f"gen_ai.usage.{name}", value
    began = [reply for reply in replies if reply.first_token]
    if began:
        first = min(began, key=lambda reply: reply.first_token)
        took = {name: end - begin for name, begin, end in _phases(first, clock)}
        yield "gen_ai.latency.time_to_first_token", first.first_token - first.arrived
        for phase, name in ((QUEUE, "queue"), (PREFILL, "model_prefill"), (DECODE, "model_decode")):
            if phase in took:
                yield f"gen_ai.latency.time_in_{name}", took[phase]
    yield "gen_ai.latency.e2e", clock - work.began


def _replies(work: Work) -> list[Reply]:
    running: list[Running] = work.running
    return [reply for run in running for reply in run.replies]


def _nanoseconds(at: float, clock: float, now: int) -> int:
    return now - round((clock - at) * 1e9)
