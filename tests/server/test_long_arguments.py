"""A long argument of a call is told as it is written, through the whole server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, events
from small_model import small_model

LATE = 3  # tokens that may have been generated and not yet told of
CHARACTERS = 10_000
TEMPLATE = "{# <tool_call> arguments #}{{ messages[0].content }}"
WORDS = "a line of code that goes on, number {}; "  # no escapes, each of which waits for its last character


@pytest.mark.slow
def test_an_argument_of_10000_characters_streams_within_three_tokens(tmp_path: Path) -> None:
    """Each event says how many tokens there are: the text of all but the last three has been told by then."""
    written = "".join(WORDS.format(place) for place in range(CHARACTERS // 30))[:CHARACTERS]
    text = {"type": "object", "properties": {"text": {"const": written}}, "required": ["text"]}
    tool = {
        "type": "function",
        "function": {"name": "write", "parameters": text | {"additionalProperties": False}},
    }
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Write."}],
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 12000,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "logprobs": True,
    }
    # Every token is chosen by the model, in a step of its own.
    options = ("plan.max_rows=1", "plan.context_len=12288", "scheduler.forced_tokens=false")
    checkpoint = small_model(tmp_path, TEMPLATE, positions=12288)
    with ServerProcess(f"checkpoint={checkpoint}", *options) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=1200).text
    chunks = [json.loads(each) for each in events(answer)[:-1]]
    told, counts, tokens, name, reason = "", list[tuple[int, int]](), list[str](), "", None
    for chunk in chunks:
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                name += call["function"].get("name") or ""
                told += call["function"].get("arguments") or ""
            reason = choice["finish_reason"] or reason
            tokens += [each["token"] for each in (choice.get("logprobs") or {}).get("content") or ()]
        counts.append((chunk["usage"]["completion_tokens"], len(told)))
    assert (name, reason) == ("write", "tool_calls")
    assert json.loads(told) == {"text": written}
    whole = "".join(tokens)
    begin = whole.index(told)
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    opens = told.index('"', told.index(":"))  # blanks before it wait for what they stand before
    late = [
        (count, length)
        for count, length in counts
        if length > opens and length < min(ends[max(0, count - LATE)] - begin, len(told))
    ]
    assert not late
    assert len(counts) > 1000
