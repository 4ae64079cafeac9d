"""SGLang's scheduler service of a real model: tokens are those of HTTP, a tokenizer that is sent is the model's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from in_process import served
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from server_process import WAIT_SECONDS, ServerProcess, until
from small_model import small_model
from test_ends import TINY
from transformers import AutoTokenizer

from makeready.engine.server.settings import ServerSettings
from makeready.engine.server.tracing import Tracing
from makeready.engine.text.bundle import bundle
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

grpc = pytest.importorskip("grpc")
pytest.importorskip("smg_grpc_proto")
from smg_grpc_proto.generated import common_pb2  # noqa: E402
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb  # noqa: E402
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub  # noqa: E402

TEXT = "The capital of France is"


@pytest.fixture
def stub(server: ServerProcess) -> Any:
    with grpc.insecure_channel(server.grpc) as channel:
        yield SglangSchedulerStub(channel)


def ids_of(server: ServerProcess, text: str = TEXT) -> list[int]:
    return httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["tokens"]


def text_of(server: ServerProcess, ids: list[int]) -> str:
    body = {"tokens": ids, "skip_special_tokens": True}
    return httpx.post(server.url + "/detokenize", json=body).json()["text"]


def asked(ids: list[int], *, stream: bool = False, scored: bool = False, **sampling: Any) -> Any:
    params = pb.SamplingParams(**{"max_new_tokens": 12, **sampling})
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params, stream=stream
    )
    if scored:
        request.return_logprob, request.top_logprobs_num = True, 2
    return request


def entries(scores: Any, optional: bool = False) -> list[tuple[int, float | None]]:
    values = [
        (each.value if each.HasField("value") else None) if optional else each
        for each in scores.token_logprobs
    ]
    return list(zip(scores.token_ids, values, strict=True))


def test_tokens_and_log_probabilities_are_those_of_http(server: ServerProcess, stub: Any) -> None:
    ids = ids_of(server)
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 12, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    wanted = httpx.post(server.url + "/generate", json=body).json()
    meta = wanted["meta_info"]
    for stream in (False, True):
        *chunks, last = stub.Generate(asked(ids, stream=stream, scored=True))
        whole = last.complete
        assert list(whole.output_ids) == wanted["output_ids"]
        assert whole.finish_reason == meta["finish_reason"]["type"]
        assert (whole.prompt_tokens, whole.completion_tokens) == (len(ids), 12)
        told = [(token, pytest.approx(value, rel=1e-5)) for value, token, _ in meta["output_token_logprobs"]]
        assert entries(whole.output_logprobs) == told
        first = [
            (token, None if value is None else pytest.approx(value, rel=1e-5))
            for value, token, _ in meta["input_token_logprobs"]
        ]
        assert entries(whole.input_logprobs, optional=True) == first
        assert [list(each.token_ids) for each in whole.output_logprobs.top_logprobs] == [
            [token for _, token, _ in each] for each in meta["output_top_logprobs"]
        ]
        assert bool(chunks) == stream
        if stream:
            assert entries(chunks[0].chunk.input_logprobs, optional=True) == first
            assert not any(each.chunk.HasField("input_logprobs") for each in chunks[1:])
            assert [entry for each in chunks for entry in entries(each.chunk.output_logprobs)] == told


def test_stops(server: ServerProcess, stub: Any) -> None:
    ids = ids_of(server)
    (plain,) = stub.Generate(asked(ids))
    text = text_of(server, list(plain.complete.output_ids))
    word = re.findall(r" \w+", text)[1]
    (stopped,) = stub.Generate(asked(ids, stop=[word]))
    assert stopped.complete.finish_reason == "stop"
    assert stopped.complete.matched_stop_str == word
    assert text_of(server, list(stopped.complete.output_ids)).startswith(text[: text.index(word)])
    assert len(stopped.complete.output_ids) < 12
    third = plain.complete.output_ids[2]
    (by_id,) = stub.Generate(asked(ids, stop_token_ids=[third]))
    assert by_id.complete.matched_token_id == third
    assert len(by_id.complete.output_ids) <= 3


TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[0-9]{3}"}, "end": "</a>"},
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
# The grammar, its name in HTTP, and what an output that ends matches: blanks in JSON are the model's.
CONSTRAINTS = {
    "regex": ("[0-9]{4}", "regex", r"\d{4}"),
    "ebnf_grammar": ('root ::= "yes" | "no"', "ebnf", "yes|no"),
    "json_schema": (json.dumps(SCHEMA), "json_schema", r'\{\s*"a"\s*:\s*[12]\s*\}'),
    "structural_tag": (json.dumps(TAG), "structural_tag", r"<a>\d{3}</a>"),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_an_output_follows_its_constraint(name: str, server: ServerProcess, stub: Any) -> None:
    grammar, field, pattern = CONSTRAINTS[name]
    ids = ids_of(server)
    (message,) = stub.Generate(asked(ids, max_new_tokens=100, **{name: grammar}))
    params = {"max_new_tokens": 100, "temperature": 0, field: grammar}
    body = {"input_ids": ids, "sampling_params": params}
    wanted = httpx.post(server.url + "/generate", json=body).json()
    assert list(message.complete.output_ids) == wanted["output_ids"]
    assert message.complete.finish_reason == wanted["meta_info"]["finish_reason"]["type"]
    if name != "json_schema" or message.complete.finish_reason == "stop":
        assert re.fullmatch(pattern, text_of(server, list(message.complete.output_ids)))
    wrong = asked(ids_of(server), **{name: "{" if name != "regex" else "("})
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(wrong))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_tokenizer_that_is_sent_is_the_models(server: ServerProcess, stub: Any, tmp_path: Path) -> None:
    """The checkpoint is a GGUF file, so its tokenizer's files are made."""
    parts = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(part.data for part in parts)
    assert [bool(part.sha256) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].sha256 == hashlib.sha256(data).hexdigest()
    assert all(len(part.data) <= 64 << 10 for part in parts)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXT) == ids_of(server)
    chat = [{"role": "user", "content": "Hello!"}]
    body = {"messages": chat}
    wanted = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
    assert loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == wanted
    model = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert loaded.eos_token_id in model.eos_token_ids
    assert model.model_type == "llama"


def test_files_of_a_folder_are_sent_as_they_are(tmp_path: Path) -> None:
    folder = small_model(tmp_path, "{{ messages }}")
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    data = bundle(checkpoint, tokenizer)
    assert bundle(checkpoint, tokenizer) == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sent = {name: archive.read(name) for name in archive.namelist()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"} <= set(sent)
    assert all(body == (folder / name).read_bytes() for name, body in sent.items())
    assert tokenizers.Tokenizer.from_buffer(sent["tokenizer.json"]).encode("abc").ids


def test_a_call_continues_its_clients_trace() -> None:
    spans = InMemorySpanExporter()
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
    with served(ServerSettings(["fake"]), rpc=True) as server, grpc.insecure_channel(server.grpc) as channel:
        server.service.tracing = Tracing(SimpleSpanProcessor(spans))
        stub = SglangSchedulerStub(channel)
        list(stub.Generate(asked([1, 2, 3]), metadata=metadata))
        with pytest.raises(grpc.RpcError):
            list(stub.Generate(asked([9999]), metadata=metadata))
        until(lambda: sum(span.name == "llm_request" for span in spans.get_finished_spans()) == 2)
    good, bad = [span for span in spans.get_finished_spans() if span.name == "llm_request"]
    assert {span.context.trace_id for span in spans.get_finished_spans()} == {int(trace, 16)}
    assert good.kind is SpanKind.SERVER
    said = dict(good.attributes or {})
    assert said["rpc.system"] == "grpc"
    assert said["rpc.service"] == "sglang.grpc.scheduler.SglangScheduler"
    assert (said["rpc.method"], said["rpc.grpc.status_code"]) == ("Generate", 0)
    assert said["gen_ai.usage.output_tokens"] == 12
    assert (bad.attributes or {})["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    below = [span.name for span in spans.get_finished_spans() if span.name != "llm_request"]
    assert sorted(below) == ["decode", "prefill", "queue"]


@pytest.mark.slow
def test_sigterm_lets_calls_end() -> None:
    options = (*TINY, "grpc_port=0", "drain_seconds=900", "health_seconds=900")
    with ServerProcess(*options) as server, grpc.insecure_channel(server.grpc) as channel:
        stub, host = SglangSchedulerStub(channel), server.host
        call = stub.Generate(asked([1, 2, 3], stream=True, max_new_tokens=1500, ignore_eos=True))
        made = list(next(call).chunk.token_ids)
        os.kill(host, signal.SIGSTOP)  # so that it does not end before all is seen
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not stub.HealthCheck(pb.HealthCheckRequest()).healthy)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(asked([1, 2, 3])))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(refused.value.trailing_metadata())["retry-after"]
        os.kill(host, signal.SIGCONT)
        *chunks, last = call
        made += [token for each in chunks for token in each.chunk.token_ids]
        assert list(last.complete.output_ids) == made
        assert len(made) == 1500
        assert server.process.wait(WAIT_SECONDS) == 0, "".join(server.said)
