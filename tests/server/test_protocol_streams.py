"""Answers of several parts, which a small model does not write, put together by the protocols' own clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import pytest

from makeready.engine.message import CallDelta, Message, ToolCall
from makeready.engine.output import Output
from makeready.engine.pieces import Piece
from makeready.engine.protocol.anthropic.answer import MessageEvents
from makeready.engine.protocol.ollama.answer import Lines
from makeready.engine.server.problem import ServeError
from makeready.engine.server.routes import anthropic as anthropic_routes
from makeready.engine.server.routes import ollama as ollama_routes

THOUGHT, TEXT, LAST = "Hm. Rome, or Oslo?", "Let me see.", "Both."
CALLS = (
    ToolCall("call_1", "get_weather", '{"city": "Rome", "days": [1, 2]}', complete=True),
    ToolCall("call_2", "now", "{}", complete=True),
)
META = {"finish_reason": {"type": "stop"}, "cached_tokens": 5, "queue_time": 0.25, "time_to_first_token": 0.5}
OUTPUT = Output(
    f"{TEXT}\n{LAST}",
    tuple(range(40)),
    "tool_calls",
    prompt_tokens=7,
    meta_info={**META, "e2e_latency": 2.0},
    message=Message(f"{TEXT}\n{LAST}", THOUGHT, CALLS),
)


ASKED: Any = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "x"}]}


def piece(**more: Any) -> Piece:
    return Piece(0, "", (), **more)


def pieces(size: int) -> list[Piece]:
    """The answer in pieces of so many characters: thoughts, a text, two calls, a text."""
    made = [piece(reasoning_content=part) for part in parts(THOUGHT, size)]
    made += [piece(content=part) for part in parts(TEXT, size)]
    for number, call in enumerate(CALLS):
        first, *others = parts(call.arguments, size)
        made.append(piece(tool_calls=(CallDelta(number, call.id, call.name, first),)))
        made += [piece(tool_calls=(CallDelta(number, arguments=part),)) for part in others]
    made += [piece(content=part) for part in parts("\n" + LAST, size)]
    return [*made, piece(output=OUTPUT)]


def parts(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def together(each: Sequence[Piece]) -> Piece:
    """What a slow reader gets."""
    calls = tuple(call for one in each for call in one.tool_calls)
    return piece(
        reasoning_content="".join(one.reasoning_content for one in each),
        content="".join(one.content for one in each),
        tool_calls=calls,
        output=OUTPUT,
    )


def anthropic_client(text: str) -> anthropic.Anthropic:
    """Which gets this as the events of every answer."""
    answer = httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})
    transport = httpx2.MockTransport(lambda request: answer)
    http_client = anthropic.DefaultHttpxClient(transport=transport)
    return anthropic.Anthropic(api_key="x", http_client=http_client, max_retries=0)


def ollama_client(text: str) -> ollama.Client:
    """Which gets this as every answer."""
    return ollama.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, text=text)))


def anthropics(each: Sequence[Piece]) -> anthropic.types.Message:
    """What Anthropic's client makes of the events."""
    events = MessageEvents("x", {"model": "m", "max_tokens": 100}, 7)
    sent = [*events.begin(), *(event for one in each for event in events.take(one))]
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in sent)
    with anthropic_client(text).messages.stream(**ASKED) as stream:
        made = stream.get_final_message()
    assert made.to_dict(exclude_unset=True) | {"stop_details": None} == {
        **events.message,
        "stop_details": None,
    }
    return made


def test_blocks_of_a_message() -> None:
    for size in (1, 3, 1000):
        made = anthropics(pieces(size))
        thought, text, first, second, last = made.content
        assert (thought.type, thought.thinking) == ("thinking", THOUGHT)
        assert (text.text, last.text) == (TEXT, "\n" + LAST)
        assert (first.id, first.name, first.input) == (
            "call_1",
            "get_weather",
            json.loads(CALLS[0].arguments),
        )
        assert (second.id, second.name, second.input) == ("call_2", "now", {})
        assert made.stop_reason == "tool_use"
        usage = made.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 5, 40)
    slow = anthropics([together(pieces(3))])
    assert [block.type for block in slow.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert slow.content[0].signature == made.content[0].signature


def test_an_answer_that_is_cut() -> None:
    """At the client's limit, or at the context's: of a call there is what is whole, which Ollama has no place for."""
    begun = '{"city": "Rome", "days": [1, 2], "note": "wi'
    meta = META | {"e2e_latency": 2.0, "finish_reason": {"type": "length", "length": 100}}
    message = Message(None, None, (ToolCall("call_1", "get_weather", begun),))
    for tokens, reason in ((100, "max_tokens"), (99, "model_context_window_exceeded")):
        output = Output("", tuple(range(tokens)), "length", 7, meta_info=meta, message=message)
        each = [piece(tool_calls=(CallDelta(0, "call_1", "get_weather", begun),)), piece(output=output)]
        made = anthropics(each)
        assert made.stop_reason == reason
        assert made.content[0].to_dict()["input"] == {"city": "Rome", "days": [1, 2]}
        lines = Lines(True, "m", None)
        (end,) = [line for one in each for line in lines.take(one)]
        assert (end["done_reason"], end["message"]) == ("length", {"role": "assistant", "content": ""})
        assert lines.whole(output)["message"] == end["message"]


def test_lines_of_an_answer() -> None:
    for each in (pieces(1), pieces(1000), [together(pieces(3))]):
        lines = Lines(True, "m", None)
        sent = [line for one in each for line in lines.take(one)]
        text = "".join(json.dumps(line) + "\n" for line in sent)
        *got, end = ollama_client(text).chat("m", stream=True)
        assert "".join(line.message.thinking or "" for line in got) == THOUGHT
        assert "".join(line.message.content for line in got) == f"{TEXT}\n{LAST}"
        calls = [call for line in got for call in line.message.tool_calls or ()]
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            (call.name, json.loads(call.arguments)) for call in CALLS
        ]
        assert (end.done, end.done_reason) == (True, "stop")
        times = (end.total_duration, end.prompt_eval_duration, end.eval_duration)
        assert times == (2_000_000_000, 250_000_000, 1_500_000_000)
        assert (end.prompt_eval_count, end.eval_count) == (7, 40)
        plain = ollama_client(json.dumps(lines.whole(OUTPUT))).chat("m")
        assert (plain.message.thinking, plain.message.content) == (THOUGHT, f"{TEXT}\n{LAST}")
        assert plain.message.tool_calls == calls


def test_a_stream_that_breaks_says_so() -> None:
    """The status was 200 when it began."""
    problem = ServeError(503, "the engine has gone")
    (route,) = [route for route in anthropic_routes.ROUTES if route.path == "/v1/messages"]
    assert route.broken is not None
    begun = [*MessageEvents("x", ASKED, 7).begin()]
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in begun)
    with (
        pytest.raises(anthropic.APIStatusError, match="the engine has gone"),
        anthropic_client(text + route.broken(problem).decode()).messages.stream(**ASKED) as stream,
    ):
        stream.get_final_message()
    for route in ollama_routes.ROUTES[:2]:
        assert route.broken is not None
        text = json.dumps(Lines(True, "m", None).line("x")) + "\n" + route.broken(problem).decode()
        with pytest.raises(ollama.ResponseError, match="the engine has gone"):
            list(ollama_client(text).chat("m", stream=True))
