"""Tool calls of a real model through files of rows, in both formats and as a table; and as they stream."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scripts_in_process import script
from test_scripts_smollm2 import checkpoint

from makeready.engine.async_llm import AsyncLLM, Piece
from makeready.engine.llm import LLM

__all__ = ["checkpoint"]  # a fixture

CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
# A model of 135M goes on as it has seen it.
SHOTS = "".join(
    f"<|im_start|>user\nWeather in {city}?<|im_end|>\n<|im_start|>assistant\n{CALL.format(city)}<|im_end|>\n"
    for city in ("Paris", "Rome", "Oslo")
)
TEMPLATE = (
    f"{{{{ {SHOTS!r} }}}}{{% for m in messages %}}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}{% if thinks %}{{ '<think>\n' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "Weather in London?"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
ANSWER = CALL.format("London")


@pytest.fixture
def answers(checkpoint, capfd):
    """Runs rows; gives their answers, and what was said."""
    Path("chat.jinja").write_text(TEMPLATE)

    def run(rows: list[dict[str, Any]], *options: str, output: str = "out.jsonl") -> list[dict[str, Any]]:
        Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = (checkpoint, "target=cpu", "plan.max_rows=4", "sampling=greedy", "sampling.max_new_tokens=40")
        files = ("prompts=in.jsonl", f"output={output}", "chat_template=chat.jinja", "overwrite=true")
        assert script("generate")(*job, *files, *options) == 0, capfd.readouterr().err
        if output.endswith(".parquet"):
            return pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
        return [json.loads(line) for line in Path(output).read_text().splitlines()]

    return run


@pytest.mark.slow
def test_files_of_rows(answers):
    asked: dict[str, Any] = {"messages": ASKED, "tools": TOOLS}
    rows = [
        asked,
        asked | {"max_new_tokens": 25},
        asked | {"tool_choice": "none"},
        asked | {"tool_choice": "required"},
        {"prompt": "a", "tools": TOOLS},
        {"messages": ASKED, "chat_template_kwargs": {"tools": TOOLS}, "parallel_tool_calls": False},
        {"messages": ASKED, "chat_template_kwargs": {"thinks": True}, "max_new_tokens": 5},
    ]
    called, cut, plain, required, misplaced, one, thinking = answers(rows)
    (call,) = called["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "London"}'}
    assert (called["text"], called["content"], called["reasoning_content"]) == (ANSWER, None, None)
    assert (called["finish_reason"], cut["finish_reason"], plain["finish_reason"]) == (
        "tool_calls",
        "length",
        "stop",
    )
    assert ANSWER.startswith(cut["text"])
    assert '{"city": "London"}'.startswith(cut["tool_calls"][0]["function"]["arguments"])
    assert (plain["text"], plain["content"], plain["tool_calls"]) == (ANSWER, ANSWER, None)
    assert [made["function"]["name"] for made in required["tool_calls"]][:1] == ["get_weather"]
    assert "tools is for messages" in misplaced["error"]["message"]
    assert (one["tool_calls"], one["finish_reason"]) == ([call], "tool_calls")
    assert (thinking["content"], thinking["reasoning_content"].strip()) == (None, thinking["text"].strip())

    table = answers(rows, output="out.parquet")
    for row, same in zip(table, (called, cut, plain), strict=False):
        assert {name: row[name] for name in same} == same
    unread = answers([asked], "tool_call_parser=none", "reasoning_parser=none")
    assert "content" not in unread[0]

    body = {"model": "m", "messages": ASKED, "tools": TOOLS}
    ask = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    bodies = [
        body,
        body | {"max_tokens": 25},
        body | {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"model": "m", "messages": ASKED},
    ]
    served, shorter, refused, untold = (
        answer["response"]["body"] for answer in answers([ask | {"body": each} for each in bodies])
    )
    (choice,) = served["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert (choice["finish_reason"], shorter["choices"][0]["finish_reason"]) == ("tool_calls", "length")
    assert refused["error"]["param"] == "tool_choice"
    assert untold["choices"][0]["message"]["content"] == ANSWER


def test_streams(checkpoint):
    made = checkpoint.removeprefix("checkpoint=")

    async def pieces(served: AsyncLLM, **more: Any) -> list[Piece]:
        asked = {"temperature": 0, "max_new_tokens": 40}
        return [piece async for piece in served.chat(ASKED, asked, tools=TOOLS, **more)]

    async def run() -> tuple[list[Piece], list[Piece]]:
        async with AsyncLLM(llm) as served:
            return await pieces(served), await pieces(served, tool_choice="none")

    with LLM(made, chat_template=TEMPLATE, target="cpu", max_rows=4) as llm:
        called, plain = asyncio.run(run())
        (whole,) = llm.chat(ASKED, {"temperature": 0, "max_new_tokens": 40}, tools=TOOLS)
        (unread,) = llm.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 4})
    deltas = [delta for piece in called for delta in piece.tool_calls]
    (call,) = whole.tool_calls
    assert (deltas[0].id, deltas[0].name) == (call.id, "get_weather")
    assert "".join(delta.arguments for delta in deltas) == call.arguments == '{"city": "London"}'
    assert len(deltas) > 3  # as it was written, not at the end
    assert "".join(piece.content for piece in called) == ""
    assert called[-1].output is not None
    assert (called[-1].output.message, called[-1].output.finish_reason) == (whole.message, "tool_calls")
    assert "".join(piece.content for piece in plain) == "".join(piece.text for piece in plain) == ANSWER
    assert (unread.message, unread.content) == (None, unread.text)
