"""Templates of answers as checkpoints have them, and texts that such models write."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
CALL = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
TAGS = {
    "tag_pattern": r"<parameter=(?P<key>\w+)>\n(?P<value>.*?)\n</parameter>",
    "value_parser": {"name": "json", "args": {"allow_non_json": True}},
}
ARGS = {"tag_pattern": '<arg name="(?P<key>[^"]+)">(?P<value>.*?)</arg>'}
TEMPLATES: dict[str, dict[str, Any]] = {
    "tags": {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json", "transform": CALL,
            },
            "content": {"close": ["<|im_end|>", "<|endoftext|>"]},
        },
    },
    "coder": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open_pattern": r"<think>\s*", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>\w+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True, "content": "xml-inline", "content_args": TAGS, "transform": NAMED,
            },
            "content": {},
        },
    },
    "gemma": {
        "start_anchor": ["<|turn>model\n", "<tool_response|>"],
        "fields": {
            "thinking": {"open": "<|channel>thought\n", "close": "<channel|>"},
            "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"]},
            "tool_calls": {
                "open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>", "repeats": True,
                "content": "json", "transform": NAMED,
                "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            },
        },
    },
    "channels": {
        "start_anchor": "<|start|>assistant",
        "fields": {
            "thinking": {"open_pattern": r"<\|channel\|>analysis<\|message\|>", "close": "<|end|>"},
            "content": {
                "open_pattern": r"<\|channel\|>final<\|message\|>", "close_pattern": r"<\|end\|>|<\|return\|>|$",
            },
            "tool_calls": {
                "open_pattern":
                    r"<\|channel\|>commentary to=functions\.(?P<name>[\w.]+)\s*(?:<\|constrain\|>json)?<\|message\|>",
                "close_pattern": r"<\|call\|>|(?=<\|start\|>)",
                "repeats": True, "content": "json", "transform": NAMED,
            },
        },
    },
    "list": {
        "start_anchor_pattern": r"\[/INST\]\s?",
        "fields": {
            "tool_calls": {
                "open": "[TOOL_CALLS]", "close_pattern": r"</s>|\Z", "content": "json", "transform_each": True,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
            },
            "content": {"content_args": {"strip": False}, "close": "</s>"},
        },
    },
    "optional tail": {
        "start_anchor": "A:",
        "fields": {
            "content": {},
            "thinking": {
                "open_pattern": "<t(?:hink)?>(?: now)?", "close_pattern": "</t>(?: end)?!?",
                "repeats": True, "join": "+",
            },
            "tool_calls": {
                "open_pattern": "<c(?P<name>[a-z]{1,3}?)>+", "close_pattern": "(?:</c>)+|</c[a-z]*> *",
                "repeats": True, "content": "kv-lines", "content_args": {"value_parser": {"name": "int"}},
                "transform": NAMED,
            },
        },
    },
}  # fmt: skip
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "n": {"type": "number"}},
            },
        },
    }
]
WRITTEN: dict[str, list[str]] = {
    "tags": [
        "Hello there.",
        "<think>\nlet me see\n</think>\n\nAn answer.<|im_end|>",
        '<think></think>\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "s": "x"}}\n</tool_call>',
        'Text first. <tool_call>{"name": "add", "arguments": {"a": "7", "n": [1]}}</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "<think>never closed",
        "a < b, <thin, <tool_cal",
    ],
    "coder": [
        "<think>\n\nhm</think>Now <tool_call>\n<function=add>\n<parameter=a>\n7\n</parameter>\n<parameter=s>\n"
        "two\nlines\n</parameter>\n</function>\n</tool_call>",
        "<tool_call><function=add></function></tool_call>",
    ],
    "gemma": [
        "<|channel>thought\nso\n<channel|>Hi."
        '<|tool_call>call:add{a:1,s:<|"|>a "b" {c:1}<|"|>,n:2.5}<tool_call|><turn|>',
        "plain<turn|>",
    ],
    "channels": [
        "<|channel|>analysis<|message|>I think<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 3}'
        "<|start|>assistant<|channel|>final<|message|> done ",
    ],
    "list": [
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]</s>',
        " as it is \n",
    ],
    "optional tail": [
        "one <t>two</t> end! <think> now three </t>!four<cab>>a: 1\nb: 2</c></c>",
        "<t>x</t> en<cabc>></cde>  ",
    ],
}  # fmt: skip
# Of answers whose content has several parts.
PARTS = {WRITTEN["optional tail"][0]: ["one", "four"], WRITTEN["tags"][3]: ["Text first.", ""]}
PROMPTS = {
    "tags": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "coder": "<|im_start|>assistant\n",
    "gemma": "<|turn>user\nhi<turn|>\n<|turn>model\n",
    "channels": "<|start|>user<|message|>hi<|end|><|start|>assistant",
    "list": "[INST] hi [/INST]",
    "optional tail": "Q: A? A:",
}
