"""What families write is read the same however it is cut into pieces, and nothing of it is lost."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.engine.message import Event, Gathered, Message
from makeready.engine.text.formats.base import Format, format_of
from makeready.engine.text.formats.scan import Reading, Scanner
from makeready.engine.text.formats.source import Token

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "number"},
                    "text": {"type": "string"},
                    "maybe": {"type": ["string", "null"]},
                    "flag": {"type": "boolean"},
                    "items": {"type": "array"},
                    "map": {"$ref": "#/$defs/map"},
                    "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
                "$defs": {"map": {"type": "object"}},
            },
        },
    },
    {"name": "now", "parameters": {}},
]
FORMATS = {
    "qwen": format_of(None, "qwen", "think"),
    "qwen3_coder": format_of(None, "qwen3_coder", "think"),
    "deepseekv3": format_of(None, "deepseekv3", "think"),
    "deepseekv31": format_of(None, "deepseekv31", "think"),
    "llama3": format_of(None, "llama3", "none"),
    "mistral": format_of(None, "mistral", "mistral"),
    "pythonic": format_of(None, "pythonic", "none"),
    "gpt-oss": format_of(None, "gpt-oss"),
}
DS, DE, DC, DX, DP = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
V3 = f"{DC}function{DP}%s\n```json\n%s\n```{DX}"
V31 = f"{DC}%s{DP}%s{DX}"
CODER = "<tool_call>\n<function=add>\n%s</function>\n</tool_call>"
TAGS = "<tool_call>%s</tool_call>"
PARAMETER = "<parameter=%s>\n%s\n</parameter>\n"
HARMONY = "<|start|>assistant<|channel|>commentary to=functions.%s <|constrain|>json<|message|>%s<|call|>"


def tool_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def written(family: str, *calls: tuple[str, str]) -> str:
    """Calls as a family writes them; arguments are JSON that is Python, too."""
    if family == "qwen":
        return "\n".join(tool_call(*call) for call in calls)
    if family == "qwen3_coder":
        made = []
        for name, arguments in calls:
            values = {
                key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for key, value in json.loads(arguments).items()
            }
            body = "".join(PARAMETER % item for item in values.items())
            made.append(CODER.replace("add", name) % body)
        return "\n".join(made)
    if family.startswith("deepseek"):
        form = V3 if family == "deepseekv3" else V31
        return DS + "\n".join(form % call for call in calls) + DE
    if family == "llama3":
        return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)
    if family == "mistral":
        listed = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls)
        return f"[TOOL_CALLS] [{listed}]"
    if family == "pythonic":
        made = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in json.loads(arguments).items())})"
            for name, arguments in calls
        ]
        return f"[{', '.join(made)}]"
    return "".join(HARMONY % call for call in calls)


def scan(
    form: Format, pieces: Any, *, opened: str = "", tokens: frozenset[str] = frozenset(), **more: Any
) -> tuple[Message, list[Event]]:
    """The message of pieces of text, and the events that it came as."""
    scanner = Scanner(Reading(form, TOOLS, opened, **more), tokens)
    events = [event for piece in pieces for event in scanner.feed(piece)]
    events += scanner.end()
    gathered = Gathered()
    for event in events:
        gathered.take(event)
    return gathered.message(), events


def pieces_of(text: str, cuts: Any) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]


def read(form: Format, text: str, **more: Any) -> Message:
    """The message of a text, which every way to cut the text gives."""
    whole, _ = scan(form, [text], **more)
    pick = random.Random(text)
    ways = [*([cut] for cut in range(1, len(text))), list(range(1, len(text)))]
    ways += [sorted(pick.choices(range(len(text) + 1), k=4)) for _ in range(20)]
    for cuts in ways:
        assert scan(form, pieces_of(text, cuts), **more)[0] == whole, cuts
    return whole


def plain(message: Message) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    """What a message says; arguments as values where they are complete."""
    calls = [
        (call.name, json.loads(call.arguments) if call.complete else call.arguments)
        for call in message.tool_calls
    ]
    return message.content, message.reasoning_content, calls


HARD = {
    "text": 'a "quoted" \\ path\n\tnext <tool_call> </tool_call> </parameter> 🙂 é \u2028 [TOOL_CALLS] ```',
    "map": {"x": [1, {"y": {}}, []], "z": "<|end|>"},
    "items": [1, 2.5, "three", [], {}],
    "a": 7,
    "b": 1e3,
}


@pytest.mark.parametrize("family", FORMATS)
def test_calls_of_every_family(family):
    form = FORMATS[family]
    calls = [("add", json.dumps(HARD)), ("now", "{}"), ("add", '{"a": 1}'), ("unknown", '{"deep": "x"}')]
    expected = [(name, json.loads(arguments)) for name, arguments in calls]
    message = read(form, written(family, *calls))
    assert plain(message) == (None, None, expected)
    assert message.calls
    assert [call.id for call in message.tool_calls] == ["call_0", "call_1", "call_2", "call_3"]


@pytest.mark.parametrize(
    "family", [name for name in FORMATS if name not in ("llama3", "pythonic", "gpt-oss")]
)
def test_text_around_calls(family):
    form, reasoning = FORMATS[family], FORMATS[family].reasoning
    assert reasoning is not None
    calls = written(family, ("add", '{"a": 1}'))
    inside = f"I may say {calls} or\n\n{calls}"
    text = f"{reasoning.opening}\n{inside}\n{reasoning.closing}\n\nFirst.\n\n{calls}\nThen  \n{calls}\n"
    assert plain(read(form, text)) == ("First.\nThen", inside, [("add", {"a": 1})] * 2)
    # Whitespace that stands beside no marker stays.
    assert plain(read(form, " \n a\n\n b \n")) == (" \n a\n\n b \n", None, [])
    opened = f"{inside}\n{reasoning.closing}\n\n    code"
    assert plain(read(form, opened, opened=reasoning.opening)) == ("    code", inside, [])
    assert plain(read(form, f"\n\n{inside}", opened=reasoning.opening)) == (None, inside, [])
    lone = f"a {reasoning.closing} b < [ {{ ` b"
    assert plain(read(form, lone)) == (lone, None, [])
    fenced = f"So:\n```\n{calls}\n```\nand"
    assert plain(read(form, f"{fenced}\n{calls}")) == (fenced, None, [("add", {"a": 1})])
    assert plain(read(form.without_calls(), f"a {calls} b")) == (f"a {calls} b", None, [])


BROKEN = [
    ("qwen", "<tool_call>\nnot json\n</tool_call> more"),
    ("qwen", '<tool_call>\n{"arguments": {"a": 1}}\n</tool_call>'),
    ("qwen", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("qwen", '<tool_call>{"name": "add", "arguments": 5}</tool_call>'),
    ("qwen", '<tool_call>{"name": "add", "arguments": [bad}</tool_call>'),
    ("qwen", '<tool_call>{"name": "add", "arguments": {bad}}</tool_call>'),
    ("qwen", "Use `<tool_call>` tags, <tool_call> or </tool_call>."),
    ("qwen3_coder", "<tool_call>\nnot a function\n</tool_call> more"),
    ("qwen3_coder", "<function=>x</function> <function"),
    ("qwen3_coder", "<function=f>what</function>"),
    ("deepseekv3", f"{DS}{DC}function{DP}add\n{{}}{DX}{DE}"),
    ("deepseekv31", f"{DS}add{DP}{{}}{DX}{DE} x"),
    ("llama3", '{"answer": 1, "name": "add", "parameters": {}}'),
    ("llama3", '{"name": "add"'),
    ("llama3", "{}"),
    ("llama3", 'x {"name": "add", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS] what"),
    ("mistral", '[TOOL_CALLS] [1, {"name": "add"}]'),
    ("mistral", "[TOOL_CALLS]name {}"),
    ("pythonic", "[1, 2]"),
    ("pythonic", "[link](http://a.b)"),
    ("pythonic", "[f(x)]"),
    ("pythonic", "[f(a=b)]"),
    ("pythonic", "x [f(a=1)]"),
    ("gpt-oss", "just text < and <more>"),
]


@pytest.mark.parametrize(("family", "text"), BROKEN)
def test_what_is_no_call_is_content(family, text):
    if text == '{"name": "add"':  # that may still become one
        text += " x"
    assert plain(read(FORMATS[family], text)) == (text, None, [])


@pytest.mark.parametrize(
    ("family", "text", "content", "arguments"),
    [
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": bad}}</tool_call> x', ': bad}}</tool_call> x', '{"a"'),
        ("qwen3_coder", "<function=f><parameter=a>1</parameter></function>", None, {"a": "1"}),
        ("qwen3_coder", "<function=f><parameter=a>1</parameter> oops</function>", None, None),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a" 1}', " 1}", '{"a"'),
        ("pythonic", "[f(a=1, b)] x", ", b)] x", '{"a": 1'),
        ("llama3", '{"name": "f", "parameters": {"a": 1 2}}', " 2}}", '{"a": 1'),
    ],
)  # fmt: skip
def test_a_call_that_breaks_off_keeps_what_was_told(family, text, content, arguments):
    said, _, calls = plain(read(FORMATS[family], text))
    if arguments is not None:
        assert (said, calls) == (content, [("f", arguments)])
    else:  # the value is taken to go on
        assert calls == [("f", '{"a": "1</parameter> oops</function>')]


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        # keys in another order, further keys, a bracket too few, arguments as text, none at all, a trailing comma
        ("qwen", TAGS % '{"arguments": {"a": 1}, "name": "f"}', [("f", {"a": 1})]),
        ("qwen", TAGS % '{"id": 5, "name": "f", "arguments": {}, "x": [1]}', [("f", {})]),
        ("qwen", TAGS % '{"name": "f", "arguments": {"a": 1}\n', [("f", {"a": 1})]),
        ("qwen", '<tool_call>{"name": "f", "arguments": {"a": 1}', [("f", {"a": 1})]),
        ("qwen", TAGS % '{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ("qwen", TAGS % '{"name": "f"}', [("f", {})]),
        ("qwen", TAGS % '{"name": "f", "arguments": null}', [("f", {})]),
        ("qwen", TAGS % "{'name': 'f', 'arguments': {'a': None, 'b': (True,),},}", [("f", {"a": None, "b": [True]})]),
        ("qwen", TAGS % '{"name":"f","arguments":{}}\n{"name":"g","arguments":{}}', [("f", {}), ("g", {})]),
        ("qwen", TAGS % '{"name": "f", "arguments": {"a": "\\d\n\\u00e9\\x41"}}', [("f", {"a": "\\d\né\x41"})]),
        ("qwen3_coder", "<function=f>\n</function>", [("f", {})]),
        ("qwen3_coder", TAGS % "<function=f></function><function=g></function>", [("f", {}), ("g", {})]),
        ("qwen3_coder", CODER % (PARAMETER % ("text", "\n two\n\ny \n")), [("add", {"text": "\n two\n\ny \n"})]),
        ("qwen3_coder", CODER % "<parameter=text></parameter>", [("add", {"text": ""})]),
        ("qwen3_coder", CODER % (PARAMETER % ("text", "</parameter> x")), [("add", {"text": "</parameter> x"})]),
        ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
        ("llama3", '{"name": "f", "arguments": {}}\n{"name": "g", "parameters": {}};', [("f", {}), ("g", {})]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]1234[ARGS]{}', [("f", {"a": 1}), ("g", {})]),
        ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {}}', [("f", {})]),
        ("pythonic", "<|tool_call_start|>[f(a='i\\'s', b=-1e3)]<|tool_call_end|>", [("f", {"a": "i's", "b": -1e3})]),
        ("pythonic", "<function_calls>\nf(a=1)\ng()\n</function_calls>", [("f", {"a": 1}), ("g", {})]),
        ("pythonic", '[a.f(x="""one "two"\nthree""")]', [("a.f", {"x": 'one "two"\nthree'})]),
        ("gpt-oss", "<|channel|>commentary to=python<|message|>{}<|call|>", [("python", {})]),
        ("gpt-oss", " to=functions.f<|channel|>commentary json<|message|>{}", [("f", {})]),
    ],
)  # fmt: skip
def test_ways_in_which_models_write_calls(family, text, calls):
    assert plain(read(FORMATS[family], text)) == (None, None, calls)


def test_harmony_has_channels():
    text = (
        "<|channel|>analysis<|message|>One <tool_call> <|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I look.<|end|>"
        + HARMONY
        % ("f", '{"a": "<|end|>"}')
        + "<|start|>assistant<|channel|>analysis<|message|>Two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done. <b>"
    )
    form = FORMATS["gpt-oss"]
    expected = ("I look.\nDone. <b>", "One <tool_call>\nTwo", [("f", {"a": "<|end|>"})])
    assert plain(read(form, text)) == expected
    assert plain(read(form.without_calls(), text))[2] == []
    assert form.opened("x<|start|>user<|message|>y<|end|><|start|>assistant") == ""
    opened = form.opened("y<|end|><|start|>assistant<|channel|>final<|message|>")
    assert plain(read(form, "Yes<|end|>", opened=opened)) == ("Yes", None, [])
    opened = form.opened("<|start|>assistant<|channel|>")
    assert plain(read(form, "analysis<|message|>Yes<|end|>", opened=opened)) == (None, "Yes", [])


@pytest.mark.parametrize(
    ("name", "written_as", "value"),
    [
        ("a", "5", 5),
        ("a", "3.0", 3),
        ("a", "1e3", 1000),
        ("a", "five", "five"),
        ("a", "2.5", "2.5"),
        ("b", "1e400", "1e400"),
        ("b", "NaN", "NaN"),
        ("b", "-2.50", -2.5),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", "yes", "yes"),
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("maybe", "null", None),
        ("maybe", "nullify", "nullify"),
        ("maybe", "nu", "nu"),
        ("items", "[1, 'a', None]", [1, "a", None]),
        ("items", "{}", "{}"),
        ("map", '{"x": {"y": [1]}}', {"x": {"y": [1]}}),
        ("map", '{"x": ', '{"x": '),
        ("either", "None", None),
        ("either", "4", 4),
        ("unstated", "5", "5"),
    ],
)
def test_bare_text_is_cast_by_the_schema(name, written_as, value):
    text = CODER % (PARAMETER % (name, written_as))
    ((_, arguments),) = plain(read(FORMATS["qwen3_coder"], text))[2]
    assert arguments == {name: value}
    assert type(arguments[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "written_as", "value"),
    [
        *[("a", "3.0", 3), ("a", "'3'", 3), ("text", "5", "5"), ("text", "'x'", "x"), ("b", "2", 2)],
        *[
            ("flag", "'true'", True),
            ("maybe", "None", None),
            ("map", "{'a': 1}", {"a": 1}),
            ("a", "'x'", "x"),
        ],
    ],
)
def test_pythons_values_are_fitted_to_the_schema(name, written_as, value):
    ((_, arguments),) = plain(read(FORMATS["pythonic"], f"[add({name}={written_as})]"))[2]
    assert arguments == {name: value}


@pytest.mark.parametrize("family", FORMATS)
def test_arguments_come_as_they_are_written(family):
    """A string of an argument is told character by character, not when it is complete."""
    text = written(family, ("add", json.dumps({"text": "lorem ipsum " * 40})))
    scanner = Scanner(Reading(FORMATS[family], TOOLS))
    began, told, late = text.index("lorem"), "", 0
    for at, character in enumerate(text):
        told += "".join(event.text for event in scanner.feed(character) if event.kind == "arguments")
        if began < at < text.index("ipsum", began + 400):
            late = max(late, at - began + 1 - (len(told) - told.find("lorem")))
    assert late <= 1


@pytest.mark.parametrize("family", FORMATS)
def test_a_text_that_is_cut_off_stays_as_it_stands(family):
    """At every place: what was told is never taken back, and a call's arguments begin valid JSON."""
    form = FORMATS[family]
    calls = [("add", '{"a": 1, "text": "some \\"text\\""}'), ("now", "{}")]
    text = written(family, *calls)
    full, _ = scan(form, [text])
    for end in range(len(text)):
        message, events = scan(form, [text[:end]])
        assert message == scan(form, text[:end])[0]
        for call, whole in zip(message.tool_calls, full.tool_calls, strict=False):
            assert call.name == whole.name
            assert whole.arguments.startswith(call.arguments) or not call.complete
            assert call.complete <= (call.arguments == whole.arguments)
        if len(message.tool_calls) == 2:
            beginning = message.content or ""
            assert any(marker.startswith(beginning) for marker in form.markers), (text[:end], message)
        assert [event.kind for event in events].count("done") == sum(c.complete for c in message.tool_calls)


@pytest.mark.parametrize("family", FORMATS)
def test_one_call_where_no_more_are_wanted(family):
    text = written(family, ("add", '{"a": 1}'), ("now", "{}"))
    message = read(FORMATS[family], text, parallel=False)
    assert plain(message) == (None, None, [("add", {"a": 1})])
    assert message.calls


def test_a_marker_that_is_a_special_token_is_none_as_text():
    form, tokens = FORMATS["mistral"], frozenset({"[TOOL_CALLS]", "[ARGS]", "</s>"})
    body = ["[TOOL_CALLS]", "f", "[ARGS]", '{"a": "[ARGS]"}']
    text = "".join(body)
    assert plain(scan(form, [text], tokens=tokens)[0]) == (text, None, [])
    for pieces in (body, list(text)):
        marked = [Token(piece) if piece in tokens else piece for piece in pieces]
        calls = [("f", {"a": "[ARGS]"})] if pieces is body else []
        assert plain(scan(form, marked, tokens=tokens)[0])[2] == calls
    # A special token within a string ends the call there.
    broken = [Token("[TOOL_CALLS]"), "f", Token("[ARGS]"), '{"a": "x', Token("[ARGS]"), 'y"}', Token("</s>")]
    assert plain(scan(form, broken, tokens=tokens)[0]) == ('y"}', None, [("f", '{"a": "x')])
    # In a block of code, too, it is one.
    fenced = ["```\n", Token("[TOOL_CALLS]"), "f", Token("[ARGS]"), "{}"]
    assert plain(scan(form, fenced, tokens=tokens)[0]) == ("```", None, [("f", {})])


PARTS = (
    *"{}[]()\"',:;\\=<`\n ",
    *("\n```\n", '{"name": "', '", "arguments": {', '{"a": 1}', "}}", "null", "f(a=", "1e5", "<parameter=a>"),
    *("<function=f>", "<think>", "</think>", "🙂", "\ufffd", "to=functions.f", "analysis"),
)
FRAGMENTS = {name: [*sorted(form.markers), *PARTS] for name, form in FORMATS.items()}


@pytest.mark.parametrize("family", FORMATS)
@given(st.data())
def test_no_text_is_read_otherwise_in_pieces(family, data):
    form = FORMATS[family]
    parts = data.draw(st.lists(st.sampled_from(FRAGMENTS[family]) | st.just("word"), max_size=25))
    # Words that occur once: each has to be somewhere, in the order of its kind.
    parts = [f"w{place}w" if part == "word" else part for place, part in enumerate(parts)]
    text = "".join(parts)
    whole, events = scan(form, [text])
    assert scan(form, text)[0] == whole
    assert scan(form, parts)[0] == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    assert scan(form, pieces_of(text, cuts))[0] == whole
    for call in whole.tool_calls:
        if call.complete:
            assert isinstance(json.loads(call.arguments), dict)
    told = "".join(event.text for event in events)
    if family != "gpt-oss":  # whose headers hold words, too
        lost = [part for part in parts if part.startswith("w") and part not in told]
        assert not [word for word in lost if f'"{word}"' not in text], (text, events)
