"""SGLang's scheduler service by grpc's own client, on an engine that computes nothing: access, limits, ends."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_executable import alone
from in_process import InProcess, served
from server_process import ROOT, WAIT_SECONDS, until

from makeready.engine.sampling import SamplingParams
from makeready.engine.server.settings import ServerSettings

grpc = pytest.importorskip("grpc")
pytest.importorskip("smg_grpc_proto")
from smg_grpc_proto.generated import common_pb2  # noqa: E402
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb  # noqa: E402
from smg_grpc_proto.generated.sglang_scheduler_pb2_grpc import SglangSchedulerStub  # noqa: E402

from makeready.engine.protocol.sglang_grpc.body import OTHERS, RENAMED, read  # noqa: E402
from makeready.engine.server.rpc.scheduler import UNSERVED, Scheduler  # noqa: E402

Code = grpc.StatusCode


@contextmanager
def connected(
    settings: ServerSettings | None = None, **options: Any
) -> Iterator[tuple[InProcess, SglangSchedulerStub]]:
    with served(settings, rpc=True, **options) as server, grpc.insecure_channel(server.grpc) as channel:
        yield server, SglangSchedulerStub(channel)


def asked(prompt: list[int], count: int = 5, *, stream: bool = False, **sampling: Any) -> Any:
    """A greedy request, whose tokens are as many as are asked for."""
    params = pb.SamplingParams(max_new_tokens=count, ignore_eos=True, **sampling)
    return pb.GenerateRequest(
        request_id="mine",
        tokenized=pb.TokenizedInput(input_ids=prompt),
        sampling_params=params,
        stream=stream,
    )


def refused(call: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as raised:
        list(call) if hasattr(call, "__iter__") else call()
    return raised.value


def test_samples_come_whole_or_in_chunks_that_join_to_the_whole() -> None:
    with connected() as (_, stub):
        (whole,) = stub.Generate(asked([1, 2, 3]))
        assert whole.request_id == "mine"
        assert len(whole.complete.output_ids) == 5
        assert whole.complete.finish_reason == "length"
        assert (whole.complete.prompt_tokens, whole.complete.completion_tokens) == (3, 5)
        assert whole.complete.WhichOneof("matched_stop") is None
        messages = list(stub.Generate(asked([1, 2, 3], 20, stream=True, n=3)))
        for index in range(3):
            chunks = [each.chunk for each in messages if each.HasField("chunk") and each.chunk.index == index]
            (complete,) = [
                each.complete
                for each in messages
                if each.HasField("complete") and each.complete.index == index
            ]
            joined = [token for chunk in chunks for token in chunk.token_ids]
            assert joined == list(complete.output_ids)
            assert len(joined) == 20
            assert [chunk.completion_tokens for chunk in chunks][-1] == 20
            assert {chunk.prompt_tokens for chunk in chunks} == {3}


def test_tokens_are_those_of_the_engine_and_end_where_they_are_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with connected() as (_, stub):
        drawn = iter(range(100, 200))
        monkeypatch.setattr("makeready.engine.sampling.secrets.randbits", lambda bits: next(drawn))
        (given,) = stub.Generate(asked([7, 8], 200))
        assert list(given.complete.output_ids) == alone([7, 8], 100, 200, frozenset())
        (stopped,) = stub.Generate(asked([7, 8], 200, stop_token_ids=[1, 2, 3]))
        tokens = alone([7, 8], 101, 200, frozenset((1, 2, 3)))
        assert len(tokens) < 200
        assert list(stopped.complete.output_ids) == tokens
        assert stopped.complete.finish_reason == "stop"
        assert stopped.complete.matched_token_id == tokens[-1]


def test_a_client_that_leaves_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    with connected() as (server, stub):
        server.executable.shut()
        calls = [stub.Generate(asked([1, each], 200, stream=each == 1)) for each in (1, 2)]
        until(lambda: len(server.service.running) == 2)
        server.executable.allow(10)  # of the 200 that they need
        assert next(calls[0]).chunk.token_ids
        for call in calls:
            call.cancel()
        until(lambda: not server.service.running)
        server.executable.open()
        until(lambda: not server.engine.busy)
        assert server.engine.pool.held == 0
        assert server.steps < 200
        server.executable.shut()
        error = refused(stub.Generate(asked([1, 2], 200, stream=True), timeout=0.05))
        server.executable.open()
        assert error.code() is Code.DEADLINE_EXCEEDED
        until(lambda: not server.service.running and not server.engine.busy)
    assert not caplog.records


def test_abort_ends_a_request_by_its_id() -> None:
    with connected() as (server, stub):
        assert not stub.Abort(pb.AbortRequest(request_id="mine")).success
        server.executable.shut()
        call = stub.Generate(asked([1, 2], 200, stream=True))
        until(lambda: len(server.service.running) == 1)
        server.executable.allow(10)
        made = list(next(call).chunk.token_ids)
        assert stub.Abort(pb.AbortRequest(request_id="mine")).success
        server.executable.open()
        *chunks, last = call
        assert last.complete.finish_reason == "abort"
        made += [token for each in chunks for token in each.chunk.token_ids]
        assert made == list(last.complete.output_ids)
        assert 0 < len(made) < 200
        assert refused(lambda: stub.Abort(pb.AbortRequest())).code() is Code.INVALID_ARGUMENT


def test_overload_and_the_end_of_the_server_are_told() -> None:
    with connected(max_queued_requests=16) as (server, stub):
        server.executable.shut()
        calls = [stub.Generate(asked([1, 2], 200, n=16))]
        until(lambda: len(server.service.running) == 1)
        server.executable.allow(4)
        until(lambda: len(server.engine.scheduler.running) == 16)
        calls.append(stub.Generate(asked([3], 1, n=16)))
        until(lambda: len(server.service.running) == 2)
        server.executable.allow(4)
        until(lambda: len(server.engine.scheduler.waiting) == 16)
        third = stub.Generate(asked([4], 1))
        until(lambda: third.done() or len(server.service.running) == 3)
        server.executable.allow(20)
        error = refused(third)
        assert error.code() is Code.RESOURCE_EXHAUSTED
        trailing = dict(error.trailing_metadata())
        assert int(trailing["retry-after"]) >= 1
        assert int(trailing["grpc-retry-pushback-ms"]) >= 1
        server.service.draining = True
        assert refused(stub.Generate(asked([5], 1))).code() is Code.UNAVAILABLE
        health = stub.HealthCheck(pb.HealthCheckRequest())
        assert (health.healthy, health.message) == (False, "the server ends")
        server.service.draining = False
        assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
        for call in calls:
            call.cancel()
        server.executable.open()
        until(lambda: not server.engine.busy)


def test_an_engine_that_breaks_is_told() -> None:
    with connected() as (server, stub):
        server.executable.shut()
        calls = [stub.Generate(asked([1], 200, stream=stream)) for stream in (True, False)]
        until(lambda: len(server.service.running) == 2)
        server.executable.allow(20)
        assert next(calls[0]).chunk.token_ids
        server.executable.failure = RuntimeError("the device is gone")
        server.executable.open()
        for call in calls:
            error = refused(call)
            assert error.code() is Code.UNAVAILABLE
            assert "has ended" in error.details()
        assert not stub.HealthCheck(pb.HealthCheckRequest()).healthy
        assert isinstance(server.failure, RuntimeError)
        server.failure = None
        server.engine.close()


WRONG: dict[str, tuple[Any, str]] = {
    "no prompt": (pb.GenerateRequest(), "input_ids"),
    "a token that is none": (asked([9999]), "9999"),
    "too long": (asked([1] * 250, 100), "256"),
    "too many stops": (asked([1], stop_token_ids=range(40)), "stop_token_ids"),
    "a stop text without a tokenizer": (asked([1], stop=["x"]), "tokenizer"),
    "a grammar without a tokenizer": (asked([1], regex="a+"), "tokenizer"),
    "temperature": (asked([1], temperature=-1), "temperature"),
    "bias": (asked([1], logit_bias={"x": 1.0}), "logit_bias"),
    "interval": (asked([1], stream_interval=0), "stream_interval"),
    "image": (pb.GenerateRequest(mm_inputs=pb.MultimodalInputs(image_urls=["x"])), "mm_inputs"),
    "adapter": (pb.GenerateRequest(lora_id="x"), "lora_id"),
    "rank": (pb.GenerateRequest(data_parallel_rank=1), "data_parallel_rank"),
    "hidden": (pb.GenerateRequest(return_hidden_states=True), "return_hidden_states"),
    "reasoning": (pb.GenerateRequest(require_reasoning=True), "require_reasoning"),
    "scores of ids": (pb.GenerateRequest(token_ids_logprob=[1]), "token_ids_logprob"),
    "two hosts": (
        pb.GenerateRequest(disaggregated_params=pb.DisaggregatedParams(bootstrap_host="x")),
        "disaggregated_params",
    ),
}


def test_bad_input_is_refused_by_its_name() -> None:
    with connected() as (server, stub):
        for name, (request, said) in WRONG.items():
            error = refused(stub.Generate(request))
            assert error.code() is Code.INVALID_ARGUMENT, name
            assert said in error.details(), name
        custom = asked([1])
        custom.sampling_params.custom_params.update({"x": 1})
        assert "custom_params" in refused(stub.Generate(custom)).details()
        # What asks for nothing is taken: an empty message, the only rank, a text for reference.
        fine = asked([1])
        fine.mm_inputs.SetInParent()
        fine.data_parallel_rank = 0
        fine.tokenized.original_text = "x"
        assert len(next(stub.Generate(fine)).complete.output_ids) == 5
        until(lambda: not server.service.running)


def test_fields_that_were_not_set_change_nothing() -> None:
    """proto3 has no way to leave out top_p, top_k, n and repetition_penalty; 0 of them means nothing."""
    with connected() as (_, stub):
        (whole,) = stub.Generate(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1, 2])))
        assert whole.request_id
        # Without a limit it goes on until the context ends, or the model does.
        assert whole.complete.prompt_tokens == 2
        assert whole.complete.completion_tokens == 254
        assert whole.complete.finish_reason == "length"


def test_every_parameter_is_read_under_its_name() -> None:
    """And none is left to what the model's generation_config.json would like, but for the limit."""
    plain = read(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1]))).ask.sampling
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    theirs = {RENAMED.get(field.name, field.name) for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert theirs - ours == set(OTHERS)
    given = SamplingParams(temperature=0, skip_special_tokens=False)
    assert SamplingParams(**plain) == given
    assert theirs & ours - set(plain) == {"max_new_tokens", "regex", "json_schema", "structural_tag", "ebnf"}
    params = pb.SamplingParams(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, frequency_penalty=1, presence_penalty=-1,
        repetition_penalty=1.5, max_new_tokens=0, stop=["a"], stop_token_ids=[3], skip_special_tokens=True,
        n=2, min_new_tokens=1, ignore_eos=True, no_stop_trim=True, logit_bias={"5": -2.0}, ebnf_grammar="x",
    )  # fmt: skip
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[1]), sampling_params=params)
    request.return_logprob, request.logprob_start_len, request.top_logprobs_num = True, -1, 3
    assert read(request).ask.sampling == {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "frequency_penalty": 1,
        "presence_penalty": -1, "repetition_penalty": 1.5, "max_new_tokens": 0, "stop": ["a"],
        "stop_token_ids": [3], "skip_special_tokens": True, "n": 2, "min_new_tokens": 1, "ignore_eos": True,
        "no_stop_trim": True, "logit_bias": {"5": -2.0}, "ebnf": "x", "return_logprob": True,
        "logprob_start_len": -1, "top_logprobs_num": 3,
    }  # fmt: skip


def test_keys() -> None:
    with connected(ServerSettings(["fake"], api_keys=["one"], admin_key="root")) as (_, stub):

        def status(method: Any, request: Any, key: str | None) -> Any:
            metadata = () if key is None else (("authorization", f"Bearer {key}"),)
            call = method(request, metadata=metadata) if method is stub.Generate else None
            try:
                list(call) if call is not None else method(request, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()  # pyright: ignore[reportAttributeAccessIssue]
            return Code.OK

        for key, wanted in ((None, Code.UNAUTHENTICATED), ("two", Code.UNAUTHENTICATED), ("one", Code.OK)):
            assert status(stub.Generate, asked([1]), key) is wanted, key
            assert status(stub.GetModelInfo, pb.GetModelInfoRequest(), key) is wanted, key
        for key, wanted in (("one", Code.UNAUTHENTICATED), ("root", Code.OK)):
            assert status(stub.Abort, pb.AbortRequest(request_id="x"), key) is wanted, key
            assert status(stub.FlushCache, common_pb2.FlushCacheRequest(), key) is wanted, key
        assert status(stub.HealthCheck, pb.HealthCheckRequest(), None) is Code.OK
        metadata = (("x-api-key", "one"),)
        assert stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata).served_model_name == "fake"


def test_every_method_is_served_or_named() -> None:
    methods = pb.DESCRIPTOR.services_by_name["SglangScheduler"].methods
    with connected() as (_, stub):
        for method in methods:
            if method.name not in UNSERVED:
                assert method.name in vars(Scheduler)
                continue
            call = getattr(stub, method.name)
            request = call_of(method)
            error = refused(call(request) if method.server_streaming else lambda: call(request))  # noqa: B023
            assert error.code() is Code.UNIMPLEMENTED
            assert method.name in error.details()


def call_of(method: Any) -> Any:
    """An empty message of a method's kind."""
    name = method.input_type.name
    return getattr(pb, name)() if hasattr(pb, name) else getattr(common_pb2, name)()


def test_what_is_told_of_server_and_load() -> None:
    with connected() as (server, stub):
        model = stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length, model.vocab_size) == ("fake", 256, 50)
        assert list(model.architectures) == ["LlamaForCausalLM"]
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.server_type == "grpc"
        assert info.scheduler_info["max_rows"] == 16
        assert info.max_total_num_tokens == 1199 * 4
        server.executable.shut()
        call = stub.Generate(asked([1, 2], 200, n=3))
        until(lambda: len(server.service.running) == 1)
        server.executable.allow(4)
        until(lambda: server.service.client.running == 3)
        assert stub.GetServerInfo(pb.GetServerInfoRequest()).active_requests == 1
        loads = stub.GetLoads(pb.GetLoadsRequest(include=["all"]))
        assert loads.dp_rank_count == 1
        assert loads.loads[0].num_running_reqs == loads.aggregate.total_running_reqs == 3
        assert loads.loads[0].HasField("queues")
        assert not stub.FlushCache(common_pb2.FlushCacheRequest()).success
        call.cancel()
        server.executable.open()
        assert stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=WAIT_SECONDS)).success
        for wrong in (pb.GetLoadsRequest(include=["x"]), pb.GetLoadsRequest(dp_rank=1)):
            assert refused(lambda: stub.GetLoads(wrong)).code() is Code.INVALID_ARGUMENT  # noqa: B023
        until(lambda: not server.engine.busy)
        no_tokenizer = refused(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        assert no_tokenizer.code() is Code.FAILED_PRECONDITION


def test_tokens_are_told_of_in_groups() -> None:
    with connected() as (server, stub):
        server.executable.shut()
        call = stub.Generate(asked([1, 2], 50, stream=True, stream_interval=20))
        until(lambda: len(server.service.running) == 1)
        for _ in range(60):
            server.executable.allow(1)
        messages = list(call)
        counts = [len(each.chunk.token_ids) for each in messages[:-1]]
        assert sum(counts) == 50
        assert all(count >= 20 for count in counts[:-1])
        server.executable.open()


def test_many_at_once_and_a_reader_that_is_slow() -> None:
    with connected() as (server, stub):
        slow = stub.Generate(asked([9], 250, stream=True))
        done: list[int] = []

        def ask(each: int) -> None:
            for message in stub.Generate(asked([each % 50, each // 50], 8, stream=each % 2 == 0)):
                if message.HasField("complete"):
                    done.append(len(message.complete.output_ids))

        threads = [threading.Thread(target=ask, args=(each,)) for each in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert done == [8] * 200
        *chunks, last = slow
        assert [token for each in chunks for token in each.chunk.token_ids] == list(last.complete.output_ids)
        until(lambda: not server.service.running)


def test_a_message_that_is_too_large_is_refused() -> None:
    with connected(ServerSettings(["fake"], max_body_bytes=10_000)) as (_, stub):
        error = refused(stub.Generate(asked([1] * 20_000)))
        assert error.code() is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("missing", ["grpc", "smg_grpc_proto"])
def test_what_is_not_installed_is_named(missing: str) -> None:
    blocked = (
        f"import sys; sys.modules[{missing!r}] = None; from makeready.scripts.serve import main; "
        "sys.exit(main(['checkpoint=dummy', 'model=smollm2_135m', 'grpc_port=0']))"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "grpc_port=0 needs" in last
    assert last.endswith('install it with: pip install "makeready[grpc]"')


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "scripts/serve.py"), "checkpoint=/nowhere", "port=0"]
        done = subprocess.run([*command, f"grpc_port={port}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "cannot be listened at for gRPC" in done.stderr
