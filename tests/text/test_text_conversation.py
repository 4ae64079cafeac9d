"""From messages to a prompt and to how an answer is read, and back: an answer goes on as a message."""

from __future__ import annotations

import json

import pytest
from test_formats import FORMATS, TOOLS, plain, written
from tokenizers_fixture import byte_level_json, wrap

from makeready.engine.conversation import Parsers
from makeready.engine.errors import RequestError
from makeready.engine.message import Gathered
from makeready.engine.output import Output
from makeready.engine.text.chat import render_chat
from makeready.engine.text.formats.base import format_of
from makeready.engine.text.formats.scan import Scanner
from makeready.engine.text.parts import TextError

# As Qwen3's template has it, in short.
QWEN = (
    '{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{"arguments": ...}</tool_call>{% endif %}'
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for t in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + t.function.name + \'", "arguments": \' }}{{ t.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif thinks %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "2 + 2?"}]


def tokenizer(template: str | dict[str, str] | None):
    made = wrap(byte_level_json())
    made.chat_template = template
    return made


def prompt(template, messages=ASKED, parsers=None, **more):
    return (parsers or Parsers()).prompt(tokenizer(template), messages, **more)


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        (QWEN, "qwen", "think"),
        ("<tool_call> <function=a> <parameter=b> <think>", "qwen3_coder", "think"),
        ("<tool_call> <arg_key> arguments", None, None),  # GLM, which writes them otherwise
        ("<｜tool▁calls▁begin｜> <｜tool▁sep｜> ```json", "deepseekv3", None),
        ("<｜tool▁calls▁begin｜> <｜tool▁sep｜> </think>", "deepseekv31", "think"),
        ('{"name": function name, "parameters": ...}', "llama3", None),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("[func_name1(params_name1=params_value1...)]", "pythonic", None),
        ("<|channel|>analysis<|message|>", "gpt-oss", "gpt-oss"),
        ("{{ messages }}", None, None),
    ],
)
def test_the_template_tells_the_family(template, calls, reasoning):
    form = format_of(template)
    assert (form.calls and form.calls.name, form.reasoning and form.reasoning.name) == (calls, reasoning)
    none = format_of(template, "none", "none")
    assert (none.calls, none.reasoning) == (None, None)
    other = format_of(template, "llama3", "mistral")
    assert (other.calls and other.calls.name, other.reasoning and other.reasoning.name) == (
        "llama3",
        "mistral",
    )


def test_names_of_formats_are_checked():
    for given, said in (
        (
            {"tool_call_parser": "hermes"},
            "tool_call_parser='hermes' is no format; it is one of auto, none",
        ),
        ({"reasoning_parser": "qwen"}, "reasoning_parser='qwen' is no format"),
        ({"reasoning_parser": "think", "tool_call_parser": "gpt-oss"}, "two ways of writing"),
    ):
        with pytest.raises(TextError, match=said):
            Parsers(**given)


def test_what_a_prompt_opens_is_known():
    for more, opened in (({}, ""), ({"thinks": True}, "<think>"), ({"enable_thinking": False}, "")):
        text, reading = prompt(QWEN, **more)
        assert reading is not None
        assert reading.opened == opened
        assert (
            text.endswith(opened + "\n" if opened else "assistant\n") or more.get("enable_thinking") is False
        )
        assert reading.format.calls is None  # without tools nothing is a call
    asks = [{"role": "user", "content": "<think>"}]
    reading = prompt(QWEN, asks, add_generation_prompt=False)[1]
    assert reading is not None
    assert reading.opened == ""
    assert prompt("{{ messages }}")[1] is None


def test_tools_are_read_where_they_may_be_called():
    text, reading = prompt(QWEN, tools=TOOLS, tool_choice="auto")
    assert "<tools>" in text
    assert reading is not None
    assert (reading.format.calls, reading.parallel) == (FORMATS["qwen"].calls, True)
    text, reading = prompt(QWEN, tools=TOOLS, tool_choice="none")
    assert "<tools>" not in text
    assert reading is not None
    assert reading.format.calls is None
    reading = prompt(QWEN, tools=TOOLS, parallel_tool_calls=False)[1]
    assert reading is not None
    assert not reading.parallel
    with pytest.raises(RequestError, match=r"no known family.*tool_call_parser"):
        prompt("{{ tools }}", tools=TOOLS)
    assert prompt("{{ tools }}", tools=TOOLS, parsers=Parsers("none"))[1] is None
    named = {"default": "{{ messages }}", "tool_use": QWEN}
    assert prompt(named)[1] is None
    assert prompt(named, tools=TOOLS)[1] is not None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": "x"}, "tools='x' must be a list"),
        ({"tools": [5]}, r"tools\[0\]=5 must be a function"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "must be a function"),
        ({"tools": [{"type": "function", "function": {}}]}, "needs a function with a name"),
        ({"tools": [{"name": "f", "parameters": 5}]}, "parameters of tools"),
        ({"tools": [{"name": "f", "strict": "yes"}]}, "strict of tools.*must be true or false"),
        ({"tool_choice": "required"}, "asks for a call, and tools has no such function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "later"}}},
            "no such function",
        ),
        ({"tool_choice": "always"}, 'tool_choice=\'always\' must be "auto", "none", "required" or'),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls=1 must be true or false"),
    ],
)
def test_what_tools_cannot_be_is_refused(fields, said):
    with pytest.raises(RequestError, match=said):
        prompt(QWEN, **fields)


def test_an_answer_goes_on_as_a_message():
    _, reading = prompt(QWEN, tools=TOOLS)
    assert reading is not None
    calls = written("qwen", ("add", '{"a": 2, "b": 2}'), ("now", "{}"))
    answer = f"<think>\nHm.\n</think>\n\nLet me add.\n{calls}"
    scanner, gathered = Scanner(reading), Gathered()
    for event in (*scanner.feed(answer), *scanner.end()):
        gathered.take(event)
    message = gathered.message()
    assert plain(message) == ("Let me add.", "Hm.", [("add", {"a": 2, "b": 2}), ("now", {})])
    results = [{"role": "tool", "tool_call_id": call.id, "content": "4"} for call in message.tool_calls]
    text = render_chat(QWEN, [*ASKED, message.as_dict(), *results], tools=TOOLS)
    assert f"<|start|>assistant\n{answer}<|end|>\n<|start|>tool\n4<|end|>" in text
    renamed = message.as_dict()
    renamed["reasoning"] = renamed.pop("reasoning_content")
    assert render_chat(QWEN, [*ASKED, renamed, *results], tools=TOOLS) == text
    json.dumps(message.as_dict())
    # Reasoning alone, as of an answer that was cut off in it.
    only = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    assert "<think>\nHm.\n</think>\n\n<|end|>" in render_chat(QWEN, [*ASKED, only])
    with pytest.raises(TextError, match="message 0 needs content"):
        render_chat(QWEN, [{"role": "assistant", "content": None, "reasoning_content": None}])
    with pytest.raises(TextError, match="reasoning of message 0 must be a text"):
        render_chat(QWEN, [{"role": "assistant", "content": "x", "reasoning": 5}])


def test_reasoning_beside_content_and_calls_where_a_template_takes_one():
    """As gpt-oss's template does."""
    template = (
        "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('both') }}"
        "{% endif %}{{ m.thinking or m.content }}{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [call]}
    assert render_chat(template, [{**message, "content": None}]) == "Hm."
    assert render_chat(template, [{**message, "content": "I look."}]) == "I look."


def test_an_output_that_was_not_read_is_content():
    output = Output("text", (1,), "stop", 1)
    assert (output.content, output.reasoning_content, output.tool_calls) == ("text", None, ())
