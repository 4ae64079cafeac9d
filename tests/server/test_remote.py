"""The boundary to an engine's process: messages in pieces, requests of all kinds, one that cannot be loaded."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import msgspec
import pytest
from fake_executable import alone, scores
from in_process import InProcess, served
from server_process import WAIT_SECONDS

from makeready.engine.errors import RequestError
from makeready.engine.options import SchedulerOptions
from makeready.engine.pieces import Piece
from makeready.engine.remote.channel import Channel, ClosedError, Framer, framed
from makeready.engine.remote.client import EngineClient, LoadError
from makeready.engine.remote.messages import Abort, FromHost, Load, Note, Step, Submit, ToHost


def test_messages_come_through_however_they_are_cut() -> None:
    submit = Submit(
        3,
        [[1, 2], [3]],
        [2**62, 5],
        {"logit_bias": {7: -1.5}},
        [0],
        "salt",
        -4,
        ("regex", "[a]", "start: @content"),
    )
    load = Load(
        "path", {"a": None}, None, {"traffic": {"decode_rows": {1: 0.5}}}, 1.5, SchedulerOptions(policy="lof")
    )
    sent = [load, submit, Abort(1), Abort(1, 0), submit]
    data = b"".join(map(framed, sent))
    rng = random.Random(1)
    for _ in range(50):
        cuts = sorted(rng.sample(range(1, len(data)), rng.randrange(0, 9)))
        framer = Framer[ToHost](ToHost)
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert [message for part in parts for message in framer.feed(part)] == sent


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        list(Framer[ToHost](ToHost).feed(framed(Note("stage", "x"))))


def test_a_side_that_reads_late_stalls_nobody() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel[ToHost](ours, ToHost)
    note = Note("detail", "x" * 1000)
    for _ in range(5000):  # more than the socket takes
        channel.send(note)
    reader, count = Channel[FromHost](theirs, FromHost), 0
    while count < 5000:
        count += len(reader.receive(0.01))
        channel.receive()
    theirs.close()
    with pytest.raises(ClosedError):
        channel.receive(0.01)
    ours.close()


def collect(server: InProcess, prompt: list[int], sampling: dict[str, Any]) -> list[Piece]:
    """The pieces of a request that goes to the engine by itself."""

    async def run() -> list[Piece]:
        _, call = server.service.client.submit(server.service.front.replies(prompt, sampling))
        await call.accepted()
        return [piece async for pieces in call.pieces() for piece in pieces]

    return asyncio.run_coroutine_threadsafe(run(), server.loop).result(WAIT_SECONDS)


def test_every_kind_of_request() -> None:
    with served() as server:
        pieces = collect(
            server, [3, 4], {"n": 3, "sampling_seed": 9, "max_new_tokens": 20, "stop_token_ids": [7]}
        )
        outputs = {piece.index: piece.output for piece in pieces if piece.output is not None}
        for index, output in outputs.items():
            mine = [token for piece in pieces if piece.index == index for token in piece.token_ids]
            seed = output.meta_info["seed"]
            assert tuple(mine) == output.token_ids == tuple(alone([3, 4], seed, 20, frozenset({7})))
        assert set(outputs) == {0, 1, 2}
        prompt = [5, 6, 7] * 12  # more than one step takes
        asked = {"max_new_tokens": 0, "return_logprob": True, "logprob_start_len": 2}
        (last,) = collect(server, prompt, asked)
        assert last.output is not None
        found = [(entry.token_id, entry.logprob) for entry in last.output.input_logprobs or ()]
        assert found == scores(prompt, 2)
        assert (last.output.token_ids, last.output.finish_reason) == ((), "length")
        with pytest.raises(RequestError, match="exceed the context of 256"):
            collect(server, [1] * 200, {"max_new_tokens": 100})
        # One that ends in its first step, and one that was cached.
        for _ in range(2):
            assert len(collect(server, [8] * 20, {"max_new_tokens": 1})) == 1


def test_steps_tell_of_loads() -> None:
    with served() as server:
        collect(server, [1, 2, 3], {"max_new_tokens": 5, "ignore_eos": True})
        client = server.service.client
        assert client.last is not None
        assert client.last.new_tokens == 1
        assert (client.waiting, client.running) == (0, 0)


def test_a_model_that_cannot_be_loaded_is_told_in_a_sentence() -> None:
    message = Load("/nowhere", None, None, {"disabled_passes": [], "traffic": {}}, None, SchedulerOptions())
    with pytest.raises(LoadError, match="/nowhere"):
        asyncio.run(EngineClient.start(message, lambda kind, text: None))


def test_an_empty_step_is_small() -> None:
    """It is sent once a second by every engine that does nothing."""
    assert len(framed(Step([], [], [], [], 0, 0, (0, 0, 0), []))) < 24
